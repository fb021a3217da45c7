//! Reading untrusted files: whole into memory, never more than a limit, tensors checked one by one.

use std::{
    collections::BTreeMap,
    fmt,
    fs::File,
    io::{self, Read},
    path::Path,
};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::AdapterError;

/// Bytes before a safetensors header: its length, little-endian.
const HEADER_LENGTH_BYTES: usize = 8;

/// How much of an adapter is read before it is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadLimits {
    /// Bytes of the tensor file.
    pub file_bytes: u64,
    /// Bytes of its header.
    pub header_bytes: u64,
    /// Largest rank of a module.
    pub rank: usize,
}

impl Default for LoadLimits {
    fn default() -> Self {
        Self { file_bytes: 2 << 30, header_bytes: 16 << 20, rank: 1024 }
    }
}

/// Reads a regular file of at most `limit` bytes.
///
/// # Errors
/// `NotFound`, `Io` (also for a folder or a pipe), `TooLarge`.
pub(super) fn read_file(path: &Path, limit: u64) -> Result<Vec<u8>, AdapterError> {
    let failed = |source: io::Error| {
        let path = path.to_owned();
        if source.kind() == io::ErrorKind::NotFound {
            return AdapterError::NotFound { path };
        }
        AdapterError::Io { path, source }
    };
    let too_large =
        |bytes| AdapterError::TooLarge { path: path.to_owned(), what: "the file", bytes, limit };
    // Asked before opening, because opening a pipe would wait for a writer.
    let metadata = path.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("not a regular file")));
    }
    if metadata.len() > limit {
        return Err(too_large(metadata.len()));
    }
    let mut bytes = Vec::new();
    // The file may grow while it is read.
    File::open(path).map_err(failed)?.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

/// Reads a safetensors file; every tensor as f32, by name.
///
/// # Errors
/// Those of [`read_file`]; `Pickle`, `MalformedFile`, `DuplicateTensor`, `WrongDtype`, `NotFinite`.
pub(super) fn read_tensors(
    path: &Path,
    limits: &LoadLimits,
) -> Result<BTreeMap<String, Tensor>, AdapterError> {
    let bytes = read_file(path, limits.file_bytes)?;
    let malformed = |detail: String| AdapterError::MalformedFile { path: path.to_owned(), detail };
    if is_pickle(&bytes) {
        return Err(AdapterError::Pickle { path: path.to_owned() });
    }
    let header = header(path, &bytes, limits.header_bytes)?;
    // The safetensors crate keeps the last of two tensors of one name without a word.
    if let Some(tensor) = duplicate_key(header).map_err(|e| malformed(e.to_string()))? {
        return Err(AdapterError::DuplicateTensor { tensor });
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| malformed(e.to_string()))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let Some(values) = to_f32(view.dtype(), view.data()) else {
            return Err(AdapterError::WrongDtype { tensor: name, dtype: view.dtype().to_string() });
        };
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let value = values[index];
            return Err(AdapterError::NotFinite { tensor: name, index, value });
        }
        tensors.insert(name, Tensor::from_vec(values, view.shape(), &Device::Cpu)?);
    }
    Ok(tensors)
}

fn header<'a>(path: &Path, bytes: &'a [u8], limit: u64) -> Result<&'a [u8], AdapterError> {
    let truncated = |detail: &str| AdapterError::MalformedFile {
        path: path.to_owned(),
        detail: format!("{detail}: the file has only {} bytes", bytes.len()),
    };
    let (length, rest) = bytes
        .split_first_chunk::<HEADER_LENGTH_BYTES>()
        .ok_or_else(|| truncated("no safetensors header"))?;
    let length = u64::from_le_bytes(*length);
    if length > limit {
        let (path, what) = (path.to_owned(), "the header");
        return Err(AdapterError::TooLarge { path, what, bytes: length, limit });
    }
    usize::try_from(length)
        .ok()
        .and_then(|length| rest.get(..length))
        .ok_or_else(|| truncated(&format!("a header of {length} bytes is announced")))
}

/// A zip archive (PyTorch since 1.6) or a bare pickle under the name of a safetensors file.
fn is_pickle(bytes: &[u8]) -> bool {
    const PICKLE_PROTOCOL: u8 = 0x80;
    let is_safetensors = bytes.get(HEADER_LENGTH_BYTES) == Some(&b'{');
    bytes.starts_with(b"PK\x03\x04") || (bytes.first() == Some(&PICKLE_PROTOCOL) && !is_safetensors)
}

#[allow(clippy::wildcard_enum_match_arm, reason = "the format's other dtypes are refused alike")]
fn to_f32(dtype: Dtype, data: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Dtype::F16 => {
            data.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()
        }
        Dtype::BF16 => {
            data.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()
        }
        _ => return None,
    })
}

/// The first key that a JSON object has twice.
fn duplicate_key(json: &[u8]) -> Result<Option<String>, serde_json::Error> {
    struct Keys;

    impl<'de> Visitor<'de> for Keys {
        type Value = Option<String>;

        fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
            formatter.write_str("a JSON object of tensors")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut seen = std::collections::HashSet::new();
            let mut duplicate = None;
            while let Some((key, _)) = map.next_entry::<String, IgnoredAny>()? {
                if !seen.insert(key.clone()) {
                    duplicate.get_or_insert(key);
                }
            }
            Ok(duplicate)
        }
    }

    serde_json::Deserializer::from_slice(json).deserialize_map(Keys)
}
