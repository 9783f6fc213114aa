"""Pages on their way from the host to their devices."""

from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter

import torch
from torch import Tensor

from hf_paged.pages.group import PageGroup
from hf_paged.pages.tiers.speeds import Speeds
from hf_paged.pages.tiers.transport import page_bytes, write_pages, writing_pages

INTO_PAGES = "pages"  # by what name their speed is known


class CopyStreams:
    """A CUDA stream of its own for each device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def on(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of a device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


class Arrivals:
    """Pages that are being filled beside the computation, layer by layer; whoever reads one waits for its layer.

    That is so on CUDA devices. Elsewhere, and where storage may be moved as it grows, pages are filled at once.

    Args:
        streams: to copy on.
        speeds: are told how long it took.
    """

    def __init__(self, streams: CopyStreams, speeds: Speeds) -> None:
        self._streams = streams
        self._speeds = speeds
        self._devices: set[torch.device] = set()  # that may have something to do
        self._events: dict[int, tuple[torch.device, torch.cuda.Event]] = {}  # by layer
        self._timings: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    def write(self, group: PageGroup, pages: Sequence[int], contents: Sequence[Tensor]) -> None:
        """Fill pages of all layers of a group, which have storage.

        Args:
            group: of layers.
            pages: their ids, distinct, each with one holder, who keeps it until `finish`.
            contents: of each of them.
        """
        storages = group.storages()
        devices = {storage.device for storage in storages if storage.device.type == "cuda"}
        num_bytes = len(pages) * page_bytes(storages)
        if not group.stays_in_place or not devices:
            began_at = perf_counter()
            write_pages(storages, pages, contents)
            if not devices:
                self._speeds.note_moved(INTO_PAGES, num_bytes, perf_counter() - began_at)
            return
        layer_of = dict(zip(storages, group.layers, strict=True))
        with ExitStack() as stack:
            for device in devices:
                stream = self._streams.on(device)
                stream.wait_stream(
                    torch.cuda.current_stream(device)
                )  # which may still read them for their last holder
                stack.enter_context(torch.cuda.stream(stream))
            self._devices |= devices
            began = {device: self._record(device) for device in devices}
            for written in writing_pages(storages, pages, contents):
                device = written[0].device
                if device in devices:
                    arrival = device, self._record(device)
                    self._events |= {layer_of[storage]: arrival for storage in written}
            for device in devices:
                on_device = sum(page_bytes([storage]) for storage in storages if storage.device == device)
                self._timings.append((len(pages) * on_device, began[device], self._record(device)))

    def wait_for(self, layer: int) -> None:
        """Let what the current stream does next wait until the pages of a layer are filled."""
        if layer in self._events:
            device, event = self._events[layer]
            torch.cuda.current_stream(device).wait_event(event)

    def finish(self) -> None:
        """Wait for all, also for those of a `write` that failed."""
        for device in self._devices:
            torch.cuda.current_stream(device).wait_stream(self._streams.on(device))
        self._devices.clear()
        self._events.clear()
        for num_bytes, began, ended in self._timings:
            ended.synchronize()
            self._speeds.note_moved(INTO_PAGES, num_bytes, began.elapsed_time(ended) / 1000)
        self._timings.clear()

    def _record(self, device: torch.device) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._streams.on(device))
        return event
