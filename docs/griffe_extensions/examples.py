"""Shows the `Example:` part of a docstring as code."""

import griffe


class Examples(griffe.Extension):
    """Gives the section the name under which griffe knows it."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for every object whose docstring was read."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
