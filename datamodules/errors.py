"""The error that every part of the data raises for a bad sample."""


class BadSampleError(Exception):
    """A sample that cannot be used.

    Attributes:
        reason: a short word that can be counted, such as `video_unreadable`.
        detail: what else is known, in one line; cut where broken data made it long.
        shard: where the sample is, if that is known.
        key: its name in the shard, if that is known.
    """

    def __init__(self, reason: str, detail: str = "", *, shard: str = "", key: str = ""):
        detail = " ".join(detail[:400].encode(errors="backslashreplace").decode().split())
        self.reason, self.detail, self.shard, self.key = reason, detail, shard, key
        where = f"{shard} [{key}]: " if key else f"{shard}: " if shard else ""
        super().__init__(f"{where}{reason}{': ' + detail if detail else ''}")
