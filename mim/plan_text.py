"""The plan of `mim plan` for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

GIB, TERA = 2**30, 1e12
STATE = ("weights", "optimizer", "average", "frozen")


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """Hardware, proposal, memory, speed, time, energy, disk and loader, with what each figure rests on."""
    device, way = plan["device"], plan["way"]
    rate = plan["speed"]["peak_flops"] / TERA
    yield (
        f"{plan['recipe']}: {plan['objective']} on {device['count']} x {device['name']} "
        f"({device['memory']:.0f} GiB, {rate:.3g} TFLOP/s in {precision(way['precision'])}; "
        f"{device['source'] if plan['measured'] is None else 'a matrix product here'})"
    )
    yield from proposal(plan)
    yield from memory(plan)
    yield from speed(plan)
    yield from time_and_energy(plan)
    disk, loader = plan["checkpoints"], plan["speed"]["loader"]
    yield (
        f"checkpoints: {disk['written']} of {disk['one'] / GIB:.2f} GiB, one in {disk['every_steps']} steps, "
        f"{disk['written_bytes'] / GIB:.0f} GiB written in all"
    )
    yield (
        f"  {disk['kept']} stay = {disk['kept_bytes'] / GIB:.2f} GiB, at most {disk['most_bytes'] / GIB:.2f} GiB while "
        f"one is written"
    )
    yield f"loader: {loader['cores']:.1f} CPU cores per device at {loader['per_core']:.0f} images/s per core"
    yield f"  {loader['source']}"
    yield f"start: {plan['start']}"


def precision(name: str) -> str:
    return {"no": "float32"}.get(name, name)


def proposal(plan: dict[str, Any]) -> Iterator[str]:
    """The way, and what of it the recipe has otherwise."""
    way, own = plan["way"], plan["recipes_own"]
    how = "DDP" if way["ranks"] > 1 else "one device"
    how = "FSDP2" if way["shard"] else how
    yield f"proposed: {' '.join(way['settings'])} ({how}, batch {way['batch_size']} in micro-batches of {way['rows']})"
    others = [f"train.{key}={own[key]}" for key in own if own[key] != way[key]]
    if others:
        yield f"  the recipe alone: {', '.join(others)}"


def memory(plan: dict[str, Any]) -> Iterator[str]:
    """Bytes of one device."""
    held = plan["memory"]
    parts = [f"{name} {held['state'][name] / GIB:.2f}" for name in STATE if held["state"][name]]
    parts += [f"{name} {held[name] / GIB:.2f}" for name in ("gradients", "gathered") if held[name]]
    yield (
        f"memory of a device: {held['total'] / GIB:.2f} GiB = {' + '.join(parts)} + activations "
        f"{held['activations'] / GIB:.2f}"
    )
    yield f"  up to {held['usable'] / GIB:.1f} GiB may be used: a tenth and 1 GiB stay free"
    if plan["measured"] is not None:
        real, told = plan["measured"]["held"], plan["measured"]["predicted_held"]
        yield (
            f"  measured with {plan['measured']['rows']} images on one device: {real / GIB:.2f} GiB, predicted "
            f"{told / GIB:.2f}"
        )


def speed(plan: dict[str, Any]) -> Iterator[str]:
    """Images per second, and what they rest on."""
    found, ranks = plan["speed"], plan["way"]["ranks"]
    yield (
        f"speed: {found['images_per_s'] / ranks:.4g} images/s per device, {found['images_per_s']:.4g} together; "
        f"{found['seconds_per_step']:.4g} s per step, {found['update']:.2g} of them for the update"
    )
    operations = f"{found['flops_per_image'] / 1e9:.4g} GFLOP per image"
    yield f"  {operations} at {found['mfu']:.1%} of the peak: {found['mfu_source']}"


def time_and_energy(plan: dict[str, Any]) -> Iterator[str]:
    """Hours and kWh, with what they leave out."""
    length, ranks = plan["length"], plan["way"]["ranks"]
    yield (
        f"time: {length['steps']} steps = {length['images']} images in {plan['hours']:.3g} hours"
        + (f" = {plan['device_hours']:.3g} device hours" if ranks > 1 else "")
    )
    yield "  not counted: evaluations, waits for data, the network between machines"
    if (energy := plan["energy"]) is None:
        yield "energy: not told, as the device's power is not known"
    else:
        yield (
            f"energy: {energy['kwh']:.3g} kWh = {ranks} x {energy['watts']:.0f} W x {energy['share']:g} (assumed) x "
            f"{plan['hours']:.3g} h; not counted: CPUs, network, disks, cooling"
        )
