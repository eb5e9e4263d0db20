"""Work in several threads, such as compilations, which run outside Python most of the time."""

import queue
import threading
from collections.abc import Callable, Mapping


def parallel(
    parts: Mapping[str, Callable[[], None]], on_done: Callable[[str], None] = lambda part: None
) -> None:
    """Calls all parts, each in a thread, and waits for them.

    The wait can be interrupted. The threads cannot, and do not keep the process from ending.

    Args:
      parts: what to call, by name.
      on_done: called in this thread with the name of each part that is done.

    Raises:
      What the first part raised that failed, once all have ended.
    """
    done: queue.Queue[tuple[str, BaseException | None]] = queue.Queue()

    def call(name: str) -> None:
        try:
            parts[name]()
            done.put((name, None))
        except BaseException as error:  # raised in the thread that waits
            done.put((name, error))

    for name in parts:
        threading.Thread(target=call, args=(name,), daemon=True).start()
    errors = []
    for _ in parts:
        name, error = done.get()
        if error is None:
            on_done(name)
        else:
            errors.append(error)
    if errors:
        raise errors[0]
