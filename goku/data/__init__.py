"""Datasets: what they list, decoding, the latent cache, and the doctor that says what is wrong."""

from goku.data.config import DataConfig
from goku.data.dataset import CachedDataset, CachedSample, Item, decode_all, prepare
from goku.data.decode import decode
from goku.data.doctor import DoctorReport, doctor
from goku.data.errors import DataError, DecodeError, Problem
from goku.data.manifest import Record, Scan, read_records, scan
from goku.data.stream import ShuffledStream
from goku.data.transform import Geometry, plan

__all__ = [
    "CachedDataset",
    "CachedSample",
    "DataConfig",
    "DataError",
    "DecodeError",
    "DoctorReport",
    "Geometry",
    "Item",
    "Problem",
    "Record",
    "Scan",
    "ShuffledStream",
    "decode",
    "decode_all",
    "doctor",
    "plan",
    "prepare",
    "read_records",
    "scan",
]
