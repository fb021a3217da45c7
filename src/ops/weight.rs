//! The matrix of a projection, an embedding or a head, frozen or trained.

use std::sync::{Arc, Weak};

use candle_core::{DType, Device, Error, Result, Tensor, TensorId};

use super::storage::with_f32;
use crate::kernels::{PackedWeight, WeightForm};

/// Unpacked weights held at a time.
const BYTES_AT_ONCE: usize = 8 << 20;

/// How exactly frozen matrices are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// As in the file.
    Exact,
    /// In bf16, and so the inputs of their products.
    Bf16,
    /// 8 bits and a scale for each 64 weights.
    Int8,
    /// 4 bits and a scale for each 32 weights.
    Int4,
}

/// A matrix `[out, in]`. Cloning shares it.
#[derive(Clone)]
pub enum Weight {
    /// f32, as candle holds it; receives a gradient where it is a variable.
    Plain(Tensor),
    /// Packed for the kernels; never receives a gradient, and candle never sees it.
    Packed(Arc<PackedWeight>),
}

/// Which weight it was, without holding it.
#[derive(Debug, Clone)]
pub enum WeightIdentity {
    /// By its storage's number, which no other tensor gets.
    Plain(TensorId),
    /// By its place in memory, which is not given away while this is there.
    Packed(Weak<PackedWeight>),
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self::Plain(tensor)
    }
}

impl Weight {
    /// Which weight this is.
    #[must_use]
    pub fn identity(&self) -> WeightIdentity {
        match self {
            Self::Plain(tensor) => WeightIdentity::Plain(tensor.id()),
            Self::Packed(packed) => WeightIdentity::Packed(Arc::downgrade(packed)),
        }
    }

    /// Whether this is the weight of `identity`.
    #[must_use]
    pub fn is(&self, identity: &WeightIdentity) -> bool {
        match (self, identity) {
            (Self::Plain(tensor), WeightIdentity::Plain(id)) => tensor.id() == *id,
            (Self::Packed(packed), WeightIdentity::Packed(other)) => {
                std::ptr::eq(Arc::as_ptr(packed), other.as_ptr())
            }
            (Self::Plain(_), WeightIdentity::Packed(_))
            | (Self::Packed(_), WeightIdentity::Plain(_)) => false,
        }
    }

    /// Packs a matrix of `dtype`, whose rows `read(row, bytes)` copies as they lie in a file; called
    /// for some rows at a time, from several threads.
    ///
    /// # Errors
    /// Those of `read`; a dtype that weights cannot have.
    pub fn pack<E: From<Error> + Send>(
        precision: Precision,
        dtype: DType,
        shape: [usize; 2],
        read: impl Fn(usize, &mut [u8]) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<Self, E> {
        let source = form(dtype)?;
        let form = match precision {
            Precision::Exact => source,
            Precision::Bf16 => WeightForm::Bf16Dot,
            Precision::Int8 => WeightForm::Int8,
            Precision::Int4 => WeightForm::Int4,
        };
        Ok(Self::Packed(Arc::new(PackedWeight::pack(form, source, shape, read)?)))
    }

    /// Packs the values of a tensor `[out, in]`.
    ///
    /// # Errors
    /// Another shape or a dtype that weights cannot have.
    pub fn pack_tensor(precision: Precision, tensor: &Tensor) -> Result<Self> {
        let (rows, columns) = tensor.dims2()?;
        let bytes = little_endian(tensor)?;
        let row_bytes = columns * tensor.dtype().size_in_bytes();
        Self::pack(precision, tensor.dtype(), [rows, columns], |row, to: &mut [u8]| {
            to.copy_from_slice(&bytes[row * row_bytes..][..to.len()]);
            Ok(())
        })
    }

    /// Rows and columns.
    ///
    /// # Errors
    /// A plain tensor of another rank.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match self {
            Self::Plain(tensor) => tensor.dims2(),
            Self::Packed(packed) => Ok(packed.shape().into()),
        }
    }

    /// The dtype of the values before they were packed.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self {
            Self::Plain(tensor) => tensor.dtype(),
            Self::Packed(packed) => match packed.source() {
                WeightForm::F16 => DType::F16,
                WeightForm::Bf16 => DType::BF16,
                WeightForm::F32 | WeightForm::Bf16Dot | WeightForm::Int8 | WeightForm::Int4 => {
                    DType::F32
                }
            },
        }
    }

    /// The matrix as a tensor, untracked: bit for bit what was packed, if it was packed exactly.
    ///
    /// # Errors
    /// Where there is no memory for it.
    pub fn to_tensor(&self) -> Result<Tensor> {
        match self {
            Self::Plain(tensor) => Ok(tensor.detach()),
            Self::Packed(packed) => {
                let shape = packed.shape().to_vec();
                Tensor::from_raw_buffer(&packed.unpack(), self.dtype(), &shape, &Device::Cpu)
            }
        }
    }

    /// Lets `body` read rows as f32: it gets a function that fills a slice with whole rows from a row on.
    ///
    /// # Errors
    /// Those of `body`; a plain matrix that is not f32.
    pub(super) fn with_rows<T>(
        &self,
        op: &'static str,
        body: impl FnOnce(&(dyn Fn(usize, &mut [f32]) + Send + Sync)) -> Result<T>,
    ) -> Result<T> {
        let columns = self.dims2()?.1;
        match self {
            Self::Plain(tensor) => with_f32(tensor, op, |values| {
                body(&|first, to: &mut [f32]| {
                    to.copy_from_slice(&values[first * columns..][..to.len()]);
                })
            }),
            Self::Packed(packed) => body(&|first, to: &mut [f32]| {
                for (index, row) in to.chunks_exact_mut(columns).enumerate() {
                    packed.row(first + index, row);
                }
            }),
        }
    }

    /// Calls `body` on the bytes of [`to_tensor`](Self::to_tensor), little endian, some rows at a time.
    ///
    /// # Errors
    /// Where a plain tensor cannot be read.
    pub fn for_each_bytes(&self, mut body: impl FnMut(&[u8])) -> Result<()> {
        match self {
            Self::Plain(tensor) => body(&little_endian(tensor)?),
            Self::Packed(packed) => {
                let [rows, columns] = packed.shape();
                let at_once = (BYTES_AT_ONCE / (4 * columns.max(1))).max(1);
                for first in (0..rows).step_by(at_once) {
                    body(&packed.unpack_rows(first..(first + at_once).min(rows)));
                }
            }
        }
        Ok(())
    }

    /// A row as f32.
    ///
    /// # Errors
    /// Where a plain tensor cannot be read.
    ///
    /// # Panics
    /// Where there is no such row.
    pub fn row(&self, row: usize) -> Result<Vec<f32>> {
        match self {
            Self::Plain(tensor) => tensor.get(row)?.to_dtype(DType::F32)?.to_vec1(),
            Self::Packed(packed) => {
                let mut values = vec![0.0; packed.shape()[1]];
                packed.row(row, &mut values);
                Ok(values)
            }
        }
    }

    /// Bytes in memory.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        match self {
            Self::Plain(tensor) => tensor.elem_count() * tensor.dtype().size_in_bytes(),
            Self::Packed(packed) => packed.num_bytes(),
        }
    }

    /// Elements of the matrix.
    #[must_use]
    pub fn elem_count(&self) -> usize {
        match self {
            Self::Plain(tensor) => tensor.elem_count(),
            Self::Packed(packed) => packed.shape().iter().product(),
        }
    }
}

fn form(dtype: DType) -> Result<WeightForm> {
    #[allow(clippy::wildcard_enum_match_arm, reason = "many dtypes are no weights")]
    match dtype {
        DType::F32 => Ok(WeightForm::F32),
        DType::F16 => Ok(WeightForm::F16),
        DType::BF16 => Ok(WeightForm::Bf16),
        other => Err(Error::UnsupportedDTypeForOp(other, "weight").bt()),
    }
}

fn little_endian(tensor: &Tensor) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    #[allow(clippy::wildcard_enum_match_arm, reason = "many dtypes are no weights")]
    match tensor.dtype() {
        DType::F32 => Ok(flat.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect()),
        DType::F16 => {
            Ok(flat.to_vec1::<half::f16>()?.into_iter().flat_map(half::f16::to_le_bytes).collect())
        }
        DType::BF16 => Ok(flat
            .to_vec1::<half::bf16>()?
            .into_iter()
            .flat_map(half::bf16::to_le_bytes)
            .collect()),
        other => Err(Error::UnsupportedDTypeForOp(other, "weight").bt()),
    }
}
