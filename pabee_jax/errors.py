"""The exceptions that end a run early: a mistake of the user, or a preemption."""


class InputError(ValueError):
    """The user's input is wrong.

    The message is one sentence: what is wrong, where, and what would be right. The command-line
    programs print the message without a stack trace and exit with status 2.
    """


class Preempted(SystemExit):
    """The run received SIGTERM and saved its state; it can be resumed.

    The exit status is 143, which the shell reports for a process that SIGTERM ended. Schedulers
    therefore start the job again, and `pabee-jax train ... && pabee-jax evaluate ...` does not
    evaluate an unfinished run.
    """

    def __init__(self):
        super().__init__(143)
