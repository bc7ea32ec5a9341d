"""Where `Batch` was; it is in packing.py now."""

from retort.data.packing import Batch as Batch
