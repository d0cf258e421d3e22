"""A pool of processes that works in this one, for tests that count or patch what it computes."""

from concurrent.futures import Future


class PoolInThisProcess:
    """Takes the place of `ProcessPoolExecutor`, the class and its one instance.

    Attributes:
        submitted: The arguments of all calls, in order.
    """

    def __init__(self):
        self.submitted = []

    def __call__(self, workers, mp_context):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args):
        future = Future()
        self.submitted.append(args)
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def shutdown(self, wait, cancel_futures):
        assert cancel_futures
