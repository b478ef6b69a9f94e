"""What a frozen tower has given, so that it is not computed again: it cannot have changed."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class FrozenOutputs:
    """Runs a frozen tower, at most once for the two passes over a chunk (GradCache), and for each text in the cache.

    Args:
        cache_rows: rows that a `TextCache` holds; 0 means none.
    """

    def __init__(self, cache_rows: int) -> None:
        self._texts = TextCache(cache_rows) if cache_rows else None
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __call__(self, tower: nn.Module, batch: dict[str, Tensor], moment: tuple[int, int]) -> Tensor:
        """The tower's output, (rows, width).

        Args:
            tower: in evaluation mode.
            batch: a chunk.
            moment: (step, chunk). A pass without gradient keeps its output for the pass with gradient.
        """
        with_gradient = torch.is_grad_enabled()
        if with_gradient and moment in self._kept:
            return self._kept.pop(moment)
        with torch.no_grad():
            output = self._texts(tower, batch) if self._texts is not None else tower(batch)
        if not with_gradient:
            self._kept = {other: kept for other, kept in self._kept.items() if other[0] == moment[0]}
            self._kept[moment] = output
        return output

    def clear(self) -> None:
        """Forgets all: the tower's weights were changed."""
        self._kept.clear()
        if self._texts is not None:
            self._texts.clear()


class TextCache:
    """A text tower's outputs for the rows that were used last.

    Looked up by token ids and length, which decide the output. `text_id` does not: it stands for the
    facts that a text states, and several wordings share it.

    The tower runs on the missing rows alone, on one of each where several are equal, so outputs equal those
    of a whole batch up to rounding. Ranks miss different rows, and none at times.

    Args:
        rows: that it holds at most, on the device: rows x width values.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._place: OrderedDict[bytes, int] = OrderedDict()  # in `_outputs`; the row used last comes last
        self._outputs: Tensor | None = None

    def __len__(self) -> int:
        return len(self._place)

    def __call__(self, tower: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """(rows, width), of "text_ids" (rows, tokens) and "text_length" (rows,)."""
        ids, lengths = batch["text_ids"], batch["text_length"]
        rows = [row.tobytes() for row in torch.cat([ids, lengths[:, None].to(ids)], dim=1).cpu().numpy()]
        standing = {key: i for i, key in enumerate(rows)}  # one row of each, in order
        held = [key for key in standing if key in self._place]
        missing = [key for key in standing if key not in self._place]
        if missing:
            among = torch.tensor([standing[key] for key in missing], device=ids.device)
            computed = tower({"text_ids": ids[among], "text_length": lengths[among]})
            if self._outputs is None:
                self._outputs = computed.new_empty(self._rows, computed.shape[1])
            outputs = torch.cat([computed, self._outputs[self._places(held)]])
        else:
            assert self._outputs is not None  # something is held
            outputs = self._outputs[self._places(held)]
        for key in held:
            self._place.move_to_end(key)
        if missing:
            self._keep(missing[-self._rows :], computed[-self._rows :])
        number = {key: i for i, key in enumerate([*missing, *held])}
        return outputs[torch.tensor([number[key] for key in rows], device=ids.device)]

    def clear(self) -> None:
        self._place.clear()

    def _keep(self, keys: list[bytes], outputs: Tensor) -> None:
        """Puts at most as many rows as it holds in the place of those that were used least recently."""
        assert self._outputs is not None
        for key in keys:
            full = len(self._place) == self._rows
            self._place[key] = self._place.popitem(last=False)[1] if full else len(self._place)
        self._outputs[self._places(keys)] = outputs

    def _places(self, keys: list[bytes]) -> Tensor:
        assert self._outputs is not None
        return torch.tensor([self._place[key] for key in keys], dtype=torch.long, device=self._outputs.device)
