"""Ranks: the workers of all engines, one engine after the other, as the workers of one server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from seer_servers.service.errors import bad_request

if TYPE_CHECKING:
    from collections.abc import Mapping


def spans(sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """The first worker of each engine and the first one after it, counted over the fleet."""
    found, end = {}, 0
    for name, size in sizes.items():
        found[name] = end, end + size
        end += size
    return found


def shifted(info: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, bytes]:
    """The init body of each engine: `rank_offset`, where there is one, moved on by the workers before the engine."""
    offset, world = info.get("rank_offset"), info.get("world_size")
    if not isinstance(offset, int):
        return {name: msgspec.json.encode({"init_info": info}) for name in sizes}
    workers = sum(sizes.values())
    if isinstance(world, int) and offset + workers > world:
        raise bad_request(
            f"world_size {world} has no room for {workers} workers from rank {offset} on: "
            "an engine has come since /get_world_size was asked; ask again",
            "init_info",
        )
    return {
        name: msgspec.json.encode({"init_info": {**info, "rank_offset": offset + first}})
        for name, (first, _) in spans(sizes).items()
    }


def slices(info: dict[str, Any] | list[dict[str, Any]], sizes: Mapping[str, int]) -> dict[str, bytes]:
    """The update body of each engine: of a list with an entry for each worker, its own part."""
    if isinstance(info, dict):
        return {name: msgspec.json.encode({"update_info": info}) for name in sizes}
    if len(info) != sum(sizes.values()):
        raise bad_request(
            f"update_info has {len(info)} entries, the fleet {sum(sizes.values())} workers", "update_info"
        )
    return {name: msgspec.json.encode({"update_info": info[first:end]}) for name, (first, end) in spans(sizes).items()}
