"""The table of element types: a row for each, and nowhere else in Python anything about one.

csrc/kvc/abi.h has the same codes and csrc/kvc/types.h the conversions; a test holds the two sides
together. A type is added by a row here and a row there.
"""

import enum
import math


class Type(enum.IntEnum):
    """Type of an element. The RAW ones are only copied, never converted."""

    kv_name: str
    """What KV of this type is called in geometries and on the wire; empty for RAW."""
    itemsize: int
    """Bytes of an element."""
    torch_name: str
    exponent_bits: int
    largest: float
    """Conversions saturate at it; infinity where the type has one that is kept."""

    def __new__(
        cls,
        code: int,
        itemsize: int = 0,
        kv_name: str = "",
        torch_name: str = "",
        exponent_bits: int = 0,
        largest: float = math.inf,
    ) -> "Type":
        """A row; ``code`` is kvc_type of csrc/kvc/abi.h."""
        row = int.__new__(cls, code)
        row._value_ = code
        row.itemsize, row.kv_name, row.torch_name = itemsize, kv_name, torch_name
        row.exponent_bits, row.largest = exponent_bits, largest
        return row

    BF16 = 1, 2, "bfloat16", "bfloat16", 8
    FP16 = 2, 2, "float16", "float16", 5
    FP32 = 3, 4, "float32", "float32", 8
    E4M3 = 4, 1, "fp8_e4m3", "float8_e4m3fn", 4, 448.0
    E5M2 = 5, 1, "fp8_e5m2", "float8_e5m2", 5, 57344.0
    RAW1 = 6, 1
    RAW2 = 7, 2
    RAW4 = 8, 4
    RAW8 = 9, 8
    RAW16 = 10, 16

    @property
    def is_raw(self) -> bool:
        """Whether it is only ever copied."""
        return not self.kv_name

    @property
    def mantissa_bits(self) -> int:
        """Bits that are neither sign nor exponent."""
        return 8 * self.itemsize - 1 - self.exponent_bits

    @property
    def quiet_nan(self) -> int:
        """Bits of the NaN that conversions make, without its sign."""
        if self.itemsize == 1:
            return 0x7F
        infinity = ((1 << self.exponent_bits) - 1) << self.mantissa_bits
        return infinity | 1 << (self.mantissa_bits - 1)

    @classmethod
    def raw(cls, itemsize: int) -> "Type":
        """The RAW type of ``itemsize`` bytes."""
        return next(row for row in cls if row.is_raw and row.itemsize == itemsize)


NUMBERS = {row.kv_name: row for row in Type if not row.is_raw}
"""KV dtypes that the staged path converts among, by name."""
