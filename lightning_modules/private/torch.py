"""Private names of PyTorch that training uses."""

#: `torch.compile` puts it into the names of the parameters of a compiled module.
_COMPILED = "_orig_mod."


def before_compile(name: str) -> str:
    """Returns the name of a parameter as it was before `torch.compile`."""
    return name.replace(_COMPILED, "")
