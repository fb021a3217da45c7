//! Reading candle's CPU storage as slices.

use candle_core::{CpuStorage, Error, Layout, Result, Storage, Tensor};

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
    whole_slice(storage, layout, op)
}

/// The same, to be written.
pub(super) fn f32_slice_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
    op: &'static str,
) -> Result<&'a mut [f32]> {
    #[allow(clippy::wildcard_enum_match_arm, reason = "many dtypes are not f32")]
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[range(layout, op)?]),
        _ => Err(mismatch(op, "the input is not f32")),
    }
}

/// The elements of a contiguous CPU tensor of any dtype.
pub(super) fn whole_slice<'a, T: candle_core::WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
    op: &'static str,
) -> Result<&'a [T]> {
    let values = storage.as_slice::<T>()?.get(range(layout, op)?);
    values.ok_or_else(|| mismatch(op, "the values of an input were let go of"))
}

/// Runs `body` on the f32 elements of a tensor, where they are. `op` is for the message.
///
/// # Errors
/// Another dtype, another device, and what `body` says.
pub fn with_f32<T>(
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
