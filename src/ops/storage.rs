//! Reading candle's CPU storage as slices.

use candle_core::{CpuStorage, DType, Error, Layout, Result, Storage, Tensor};
use half::{bf16, f16};

/// A weight matrix's elements in their storage type.
pub(super) enum WeightSlice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// Runs `$body` with `$slice` bound to the typed elements.
macro_rules! for_weight {
    ($weight:expr, |$slice:ident| $body:expr) => {
        match $weight {
            $crate::ops::storage::WeightSlice::F32($slice) => $body,
            $crate::ops::storage::WeightSlice::Bf16($slice) => $body,
            $crate::ops::storage::WeightSlice::F16($slice) => $body,
        }
    };
}
pub(super) use for_weight;

fn range(layout: &Layout, op: &'static str) -> Result<std::ops::Range<usize>> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| Error::Msg(format!("{op}: the input is not contiguous")).bt())?;
    Ok(start..end)
}

/// The f32 elements of a contiguous CPU tensor.
pub(super) fn f32_slice<'a>(
    storage: &'a CpuStorage,
    layout: &Layout,
    op: &'static str,
) -> Result<&'a [f32]> {
    Ok(&storage.as_slice::<f32>()?[range(layout, op)?])
}

/// The elements of a contiguous CPU weight.
pub(super) fn weight_slice<'a>(
    storage: &'a CpuStorage,
    layout: &Layout,
    op: &'static str,
) -> Result<WeightSlice<'a>> {
    let range = range(layout, op)?;
    #[allow(clippy::wildcard_enum_match_arm)]
    match storage {
        CpuStorage::F32(data) => Ok(WeightSlice::F32(&data[range])),
        CpuStorage::BF16(data) => Ok(WeightSlice::Bf16(&data[range])),
        CpuStorage::F16(data) => Ok(WeightSlice::F16(&data[range])),
        other => {
            let dtype = candle_core::backend::BackendStorage::dtype(other);
            Err(Error::UnsupportedDTypeForOp(dtype, op).bt())
        }
    }
}

/// Runs `body` on the f32 elements of a tensor.
pub(super) fn with_f32<T>(
    tensor: &Tensor,
    op: &'static str,
    body: impl FnOnce(&[f32]) -> Result<T>,
) -> Result<T> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => body(f32_slice(storage, layout, op)?),
        Storage::Cuda(_) | Storage::Metal(_) => Err(no_device(op)),
    }
}

/// Runs `body` on the elements of a weight in its storage type.
pub(super) fn with_weight<T>(
    tensor: &Tensor,
    op: &'static str,
    body: impl FnOnce(WeightSlice<'_>) -> Result<T>,
) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => body(weight_slice(storage, layout, op)?),
        Storage::Cuda(_) | Storage::Metal(_) => Err(no_device(op)),
    }
}

/// A tensor of `data` on the CPU.
pub(super) fn tensor(data: Vec<f32>, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Tensor::from_vec(data, shape.into(), &candle_core::Device::Cpu)
}

fn no_device(op: &'static str) -> Error {
    Error::Msg(format!("{op} has no body for this device yet")).bt()
}

/// An error that names the operation where shapes do not fit.
pub(super) fn mismatch(op: &'static str, what: &str) -> Error {
    Error::Msg(format!("{op}: {what}")).bt()
}

/// The dtypes that weights may have.
pub(super) fn is_weight_dtype(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
}
