"""How a run can end early: by a mistake that a person can mend, or because it was told to."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence that says what would be right.

    The command-line programs print it without a stack trace and exit with status 2.
    """


class Preempted(SystemExit):
    """The run was told to stop (SIGTERM), has saved its state, and can go on from it.

    The exit status is 143, as the shell reports a process that SIGTERM ended: schedulers start the
    job again, and `train.py ... && evaluate.py ...` does not evaluate half a run.
    """

    def __init__(self):
        super().__init__(143)
