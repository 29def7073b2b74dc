"""Values of a stored run: its arguments and its result, decoded when they are read.

``runs.py`` is below the serializer and the definitions, so it loads this module at first use.
"""

from __future__ import annotations

from pyworkflow._codecs import describe
from pyworkflow._declared import known_workflow
from pyworkflow._serialization import decode, decode_arguments, is_wrapped
from pyworkflow.errors import SerializationError
from pyworkflow.runs import EncodedPayload

__all__ = ["arguments_of", "result_of"]


def arguments_of(workflow: str, text: str | None) -> object:
    """The arguments by the names of their parameters.

    By position (``"0"``, ``"1"``) where this process does not know the workflow, or knows it with
    other parameters.

    Raises:
        SerializationError: a type that the text names is not here, or the text is damaged.
    """
    if text is None:
        return None
    if is_wrapped(text):
        return EncodedPayload(text, describe(text))
    try:
        positional, named = decode_arguments(text)
    except (KeyError, TypeError, IndexError) as wrong:
        raise SerializationError(
            f"the stored arguments are not those of a call: workflow={workflow!r}; read args_text"
        ) from wrong
    defined = known_workflow(workflow)
    if defined is not None:
        try:
            return defined.argument_names(positional, named)
        except TypeError:  # the parameters of the workflow are others by now
            pass
    return {**{str(at): value for at, value in enumerate(positional)}, **named}


def result_of(workflow: str, text: str | None) -> object:
    """The result; None while there is none.

    Raises:
        SerializationError: as ``arguments_of``.
    """
    if text is None:
        return None
    if is_wrapped(text):
        return EncodedPayload(text, describe(text))
    defined = known_workflow(workflow)
    return decode(text) if defined is None else defined.decode_result(text)
