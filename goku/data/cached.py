"""What `prepare` returns: the items of one dataset, `CachedDataset`, or of several, `MixedDataset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cached_property

from torch import Tensor

from goku.data.collector import collector_paused
from goku.data.config import DataConfig
from goku.data.decode import decode
from goku.data.errors import DataError, DecodeError, Problem
from goku.data.filler import Entry, Filler
from goku.data.item_list import ItemList, SourceItems
from goku.data.items import CachedSample, Item, PrepareReport, SampleStream, item_of
from goku.data.mixing import Group, MixedStream
from goku.data.stream import ShuffledStream
from goku.text import LazyTextEncoder, TextCache, compact
from goku.vae import VideoVAE


class CachedDataset:
    """Items whose latents are all cached. `skipped` lists what skip_bad left out; `report` has it all.

    lost: by their place, items of a run that goes on which cannot be had now: they keep their place, and reading one
    raises DecodeError.
    """

    def __init__(
        self,
        config: DataConfig,
        filler: Filler | None,
        text: TextCache | None,
        entries: Sequence[Entry],
        report: PrepareReport,
        source: str = "",
        prefix: str = "",
        lost: Mapping[int, Problem] | None = None,
    ) -> None:
        self.config, self.source = config, source
        self.lost = dict(lost or {})
        self.items: list[Item] = [
            item_of(entry.record, entry.geometry, source, prefix) for entry in entries
        ]
        self.report = report
        self.skipped: tuple[Problem, ...] = report.problems
        self._filler = filler
        self._text = text
        self._entries = list(entries)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def entries(self) -> Sequence[Entry]:
        """What stands behind each item."""
        return self._entries

    def reading(self) -> AbstractContextManager[None]:
        """Reads within it share the text encoder that the first damaged caption loads. It goes at the end: its memory
        is that of the steps."""
        encoder = None if self._text is None else self._text.encoder
        return encoder.borrowed() if isinstance(encoder, LazyTextEncoder) else nullcontext()

    def read(self, index: int, caption: int = 0) -> CachedSample:
        """The cached sample `index` with its caption number `caption` (0: the heaviest). ValueError naming the file
        when it was damaged since `prepare` (which makes it anew), FileNotFoundError when it was removed."""
        self._check_there(index)
        entry = self._entries[index]
        assert self._filler is not None
        prompt = entry.record.prompts[caption]
        text = None if self._text is None else self._text.cached(prompt)
        return self._filler.sample(
            entry, compact(self._embedding(prompt)) if text is None else text
        )

    def cached(self, index: int, caption: int = 0) -> CachedSample | None:
        """As `read`, by any thread: None where anything of it is damaged or gone. Nothing is encoded or mended here:
        that is `read`'s."""
        if index in self.lost or self._text is None:
            return None
        entry = self._entries[index]
        assert self._filler is not None
        try:
            text = self._text.cached(entry.record.prompts[caption])
            return None if text is None else self._filler.sample(entry, text)
        except (ValueError, OSError):
            return None

    def repair(self, index: int, vae: VideoVAE) -> CachedSample:
        """Decode and encode item `index` again, write the cache and return the sample, with its heaviest caption: the
        same bits on the same machine. DecodeError when its media cannot be decoded or are not what they were, OSError
        when the cache cannot be written, ValueError and ArithmeticError as `prepare`."""
        entry = self._entries[index]
        assert self._filler is not None
        own = Filler(
            self.config,
            vae,
            self._filler.cache,
            None,
            tuple(self._filler.frames),
            self._filler.source,
        )
        if not entry.record.path:
            self._check_there(index)
        own.repair(entry)
        self.lost.pop(index, None)
        return self.read(index)

    def text(self, index: int, caption: int = 0) -> Tensor:
        """(length, dim) embedding of the item's caption alone; encoded anew when the cache lacks it."""
        return self._embedding(self._entries[index].record.prompts[caption])

    @property
    def empty_text(self) -> Tensor:
        """(length, dim) embedding of the empty prompt, for classifier-free guidance."""
        return self._embedding("")

    def _embedding(self, prompt: str) -> Tensor:
        if self._text is None:
            raise ValueError("this dataset was prepared without captions (texts=False)")
        with self.reading():
            try:
                return self._text.get([prompt])[0]
            except RuntimeError as error:  # no memory left for an encoder, say
                raise ValueError(f"the caption {prompt!r} cannot be encoded: {error}") from error

    def stream(self, seed: int) -> SampleStream:
        """Every item once an epoch, shuffled."""
        return ShuffledStream(len(self.items), seed)

    def item_list(self) -> ItemList:
        """What a run that goes on is held to."""
        return ItemList([SourceItems.of(self.source, self._entries)])

    @cached_property
    def _fingerprint(self) -> str:
        with collector_paused():
            return self.item_list().fingerprint()

    def fingerprint(self) -> str:
        """`ItemList.fingerprint`: the same wherever the dataset lies."""
        return self._fingerprint

    def pixels(self, index: int) -> Tensor:
        """(3, T, H, W) uint8: what the latent was encoded from, decoded anew."""
        self._check_there(index)
        return decode(self._entries[index].record, self.config)

    def _check_there(self, index: int) -> None:
        if index in self.lost:
            raise DecodeError(self.items[index].name, self.lost[index].reason)


class MixedDataset:
    """Several `CachedDataset`s, one a source, with the face of one: their items one after the other."""

    def __init__(self, config: DataConfig, parts: Sequence[tuple[str, CachedDataset]]) -> None:
        self.config = config
        self.parts = list(parts)
        self.items: list[Item] = [item for _, part in parts for item in part.items]
        reports = [part.report for _, part in parts]
        self.report = PrepareReport(
            listed=sum(report.listed for report in reports),
            used=sum(report.used for report in reports),
            problems=tuple(problem for report in reports for problem in report.problems),
            remarks=tuple(remark for report in reports for remark in report.remarks),
            dropped=tuple(dropped for report in reports for dropped in report.dropped),
            made=sum(report.made for report in reports),
            present=sum(report.present for report in reports),
            nbytes=sum(report.nbytes for report in reports),
        )
        self.skipped: tuple[Problem, ...] = self.report.problems
        self._places = [(part, i) for _, part in parts for i in range(len(part))]

    def __len__(self) -> int:
        return len(self.items)

    def reading(self) -> AbstractContextManager[object]:
        """As `CachedDataset.reading`."""
        with ExitStack() as stack:
            for _, part in self.parts:
                stack.enter_context(part.reading())
            return stack.pop_all()

    def read(self, index: int, caption: int = 0) -> CachedSample:
        """As `CachedDataset.read`."""
        part, own = self._places[index]
        return part.read(own, caption)

    def cached(self, index: int, caption: int = 0) -> CachedSample | None:
        """As `CachedDataset.cached`."""
        part, own = self._places[index]
        return part.cached(own, caption)

    def repair(self, index: int, vae: VideoVAE) -> CachedSample:
        """As `CachedDataset.repair`."""
        part, own = self._places[index]
        return part.repair(own, vae)

    def text(self, index: int, caption: int = 0) -> Tensor:
        """As `CachedDataset.text`."""
        part, own = self._places[index]
        return part.text(own, caption)

    @property
    def empty_text(self) -> Tensor:
        """(length, dim) embedding of the empty prompt."""
        return self.parts[0][1].empty_text

    @property
    def lost(self) -> Mapping[int, Problem]:
        """As `CachedDataset.lost`."""
        return {
            index: part.lost[own]
            for index, (part, own) in enumerate(self._places)
            if own in part.lost
        }

    def groups(self) -> list[Group]:
        """The mix's groups, (source, modality) each, in the sources' order; [] without a mix. DataError for a group
        with a weight and without an item, which names what the limits dropped."""
        groups = []
        for name, part in self.parts if self.config.mix is not None else ():
            weights = (self.config.mix or {}).get(name)
            for modality in ("image", "video"):
                weight = getattr(weights, modality, 0.0)
                if weight <= 0:
                    continue
                indices = [
                    index
                    for index, item in enumerate(self.items)
                    if item.source == name and item.modality == modality
                ]
                if not indices:
                    dropped = [str(entry) for entry in part.report.dropped[:3]]
                    why = f"; dropped: {'; '.join(dropped)}" if dropped else ""
                    raise DataError(
                        f"mix.{name}.{modality} is {weight:g}, but the source has no {modality} to train on{why}"
                    )
                groups.append(Group(f"{name}/{modality}", indices, weight))
        return groups

    def stream(self, seed: int) -> SampleStream:
        """By the mix's weights; without one every item once an epoch, shuffled."""
        groups = self.groups()
        return MixedStream(groups, seed) if groups else ShuffledStream(len(self.items), seed)

    def item_list(self) -> ItemList:
        """As `CachedDataset.item_list`."""
        mix = {name: [w.image, w.video] for name, w in (self.config.mix or {}).items()}
        sources = [SourceItems.of(name, part.entries) for name, part in self.parts]
        return ItemList(sources, mixed=True, mix=None if self.config.mix is None else mix)

    @cached_property
    def _fingerprint(self) -> str:
        with collector_paused():
            return self.item_list().fingerprint()

    def fingerprint(self) -> str:
        """Hash of the sources by name and content, and of the mix."""
        return self._fingerprint

    def pixels(self, index: int) -> Tensor:
        """As `CachedDataset.pixels`."""
        part, own = self._places[index]
        return part.pixels(own)
