"""Descriptions of GPUs, from which XLA compiles for a GPU that is not there.

The format is the text of XLA's message `GpuTargetConfigProto`. The values are those that CUDA
reports as the properties of the device.
"""

GPU_TARGETS = {
    "h100": """
        platform_name: "CUDA"
        device_description_str: "NVIDIA H100 80GB HBM3"
        gpu_device_info {
          cuda_compute_capability { major: 9 minor: 0 }
          core_count: 132
          fpus_per_core: 128
          clock_rate_ghz: 1.98
          memory_bandwidth: 3352320000000
          device_memory_size: 84978434048
          l2_cache_size: 52428800
          shared_memory_per_core: 233472
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: 232448
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
        }
        dnn_version_info { major: 9 minor: 8 }
        runtime_version { major: 13 minor: 0 }
    """,
}
