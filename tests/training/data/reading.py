"""Whole samples out of shards."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from training.data.resumable_stage import Record
from training.data.shards import Sample, ShardReader

COUNTS = {"image_ND": "image_tokens", "text_ND": "text_tokens"}  # 0 where there is no tensor


def read_sample(reader: ShardReader, record: Record) -> dict[str, Tensor]:
    """Read every tensor of a sample that its manifest line announces."""
    return {
        field.name: reader.read(record, field.name)
        for field in fields(Sample)
        if field.name not in COUNTS or record[COUNTS[field.name]] > 0
    }
