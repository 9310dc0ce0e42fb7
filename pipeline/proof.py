"""`reseg verify`: what is published is what inputs, network and settings give, and no bit has flipped."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage, upkeep
from pipeline.bundle import load_bundle
from pipeline.errors import ConfigError
from pipeline.lookup import require_night
from pipeline.recompute import Recomputed, recompute_sample
from pipeline.upkeep import Checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was verified. images: those computed again; checked: what reading all files found."""

    night: int
    images: Sequence[Recomputed]
    checked: Checked | None

    @property
    def outcomes(self) -> dict[str, int]:
        """How many images are equal, different, gone."""
        found = Counter(item.outcome for item in self.images)
        return {name: found[name] for name in ("equal", "different", "gone")}

    @property
    def holds(self) -> bool:
        """Whether nothing differs and nothing is damaged."""
        if self.checked and (self.checked.damaged or self.checked.unsealed):
            return False
        return not self.outcomes["different"] and (not self.images or self.outcomes["equal"] > 0)

    @property
    def sentence(self) -> str:
        """What does not hold."""
        damaged = self.checked.damaged if self.checked else ()
        parts = []
        if self.outcomes["different"]:
            first = next(item for item in self.images if item.outcome == "different")
            parts.append(
                f"{self.outcomes['different']} of {len(self.images)} masks differ when computed again, "
                f"as {first.image_id!r}"
            )
        if self.images and not self.outcomes["equal"] and not parts:
            parts.append("not one mask could be computed again: the source is another by now")
        if self.checked and self.checked.unsealed:
            nights = ", ".join(map(str, self.checked.unsealed))
            parts.append(f"the log entries of night {nights} have no digests to hold them against")
        if damaged:
            parts.append(f"{len(damaged)} files are damaged, as {damaged[0]}")
        return "; ".join(parts)

    def to_plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "night": self.night,
            "holds": self.holds,
            "recomputed": {**self.outcomes, "images": [item.to_plain() for item in self.images]},
            "checksums": self.checked and self.checked.to_plain(),
        }


def verify_results(
    location: str,
    number: int | None,
    *,
    sample: int,
    checksums: bool,
    bundle: str | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Proof:
    """Compute `sample` images of a night again, and read all files of all kept nights.

    bundle: where the night's network is now; None: where it was. Raises ConfigError if it is another.
    """
    checked = upkeep.verify_checksums(storage.resolve(location), progress) if checksums else None
    if not sample and checked is not None and checked.damaged:
        return Proof(night=max(checked.nights, default=0), images=(), checked=checked)
    night = require_night(location, number)
    images: Sequence[Recomputed] = ()
    if sample:
        stored = night.metadata["bundle"]
        network = load_bundle(bundle or stored["uri"])
        if network.digest != stored["digest"]:
            raise ConfigError(
                f"night {night.number} was made with the bundle {stored['digest'][:12]}, but "
                f"{network.uri} is {network.digest[:12]}; say where it is: --bundle"
            )
        images = recompute_sample(
            night, network, sample, device=device, seed=seed, progress=progress
        )
    return Proof(night=night.number, images=images, checked=checked)
