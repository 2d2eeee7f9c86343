"""The error that all data code raises for a bad sample."""


class BadSampleError(Exception):
    """A sample that cannot be used.

    Attributes:
        reason: a short word for counting, such as `video_unreadable`.
        detail: more information in one line; cut to 400 characters.
        shard: the shard of the sample, if known.
        key: the name of the sample in the shard, if known.
    """

    def __init__(self, reason: str, detail: str = "", *, shard: str = "", key: str = ""):
        detail = " ".join(detail[:400].encode(errors="backslashreplace").decode().split())
        self.reason, self.detail, self.shard, self.key = reason, detail, shard, key
        where = f"{shard} [{key}]: " if key else f"{shard}: " if shard else ""
        super().__init__(f"{where}{reason}{': ' + detail if detail else ''}")
