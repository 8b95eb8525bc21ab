"""Datasets: what they list, decoding, the latent cache, and the doctor that says what is wrong."""

from goku.data.cached import CachedDataset, MixedDataset
from goku.data.clips import decode_all
from goku.data.config import DataConfig, MixConfig, SourceConfig
from goku.data.dataset import prepare
from goku.data.decode import decode
from goku.data.doctor import DoctorReport, doctor
from goku.data.errors import DataError, DecodeError, Dropped, Problem, Remark
from goku.data.item_list import ItemList
from goku.data.items import CachedSample, Dataset, Item, PrepareReport, SampleStream
from goku.data.manifest import read_records, scan
from goku.data.mixing import Group, MixedStream
from goku.data.quarantine import Quarantine, quarantine_message
from goku.data.record import Record, Scan
from goku.data.sources import list_records
from goku.data.stream import ShuffledStream
from goku.data.transform import Geometry, plan

__all__ = [
    "CachedDataset",
    "CachedSample",
    "DataConfig",
    "DataError",
    "Dataset",
    "DecodeError",
    "DoctorReport",
    "Dropped",
    "Geometry",
    "Group",
    "Item",
    "ItemList",
    "MixConfig",
    "MixedDataset",
    "MixedStream",
    "PrepareReport",
    "Problem",
    "Quarantine",
    "Record",
    "Remark",
    "SampleStream",
    "Scan",
    "ShuffledStream",
    "SourceConfig",
    "decode",
    "decode_all",
    "doctor",
    "list_records",
    "plan",
    "prepare",
    "quarantine_message",
    "read_records",
    "scan",
]
