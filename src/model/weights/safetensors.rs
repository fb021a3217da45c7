//! `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
//!
//! Only headers are read at once. A tensor is read row by row to where it is packed, so that memory
//! never holds a file beside the weights made of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, tensor::Metadata};
use serde::Deserialize;

use crate::model::ModelError;

/// The safetensors format's own limit on a header.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of a tensor that are read at once.
const READ_BYTES: usize = 1 << 20;

/// The tensors of a folder, each in its file's dtype.
#[derive(Clone)]
pub(in crate::model) struct SafetensorsFolder {
    tensors: BTreeMap<String, StoredTensor>,
    dir: PathBuf,
}

/// One tensor of a file.
#[derive(Clone)]
pub(in crate::model) struct StoredTensor {
    file: Arc<File>,
    path: PathBuf,
    /// Its first byte in the file.
    start: u64,
    pub(in crate::model) dtype: DType,
    shape: Vec<usize>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl SafetensorsFolder {
    /// Whether the folder has weights at all.
    pub(in crate::model) fn exists(dir: &Path) -> bool {
        dir.join("model.safetensors").exists() || dir.join("model.safetensors.index.json").exists()
    }

    /// Reads the headers of all files.
    pub(in crate::model) fn open(dir: &Path) -> Result<Self, ModelError> {
        let mut folder = Self { tensors: BTreeMap::new(), dir: dir.to_owned() };
        for path in shards(dir)? {
            folder.open_file(&path)?;
        }
        Ok(folder)
    }

    /// Finds a tensor, checking its shape.
    pub(in crate::model) fn find(
        &self,
        name: &str,
        shape: &[usize],
    ) -> Result<&StoredTensor, ModelError> {
        let broken =
            |path: &Path, message: String| ModelError::Weights { path: path.to_owned(), message };
        let tensor = self
            .tensors
            .get(name)
            .ok_or_else(|| broken(&self.dir, format!("tensor {name:?} is missing")))?;
        if tensor.shape == shape {
            return Ok(tensor);
        }
        let has = &tensor.shape;
        Err(broken(
            &tensor.path,
            format!("tensor {name:?} has shape {has:?}, config.json asks for {shape:?}"),
        ))
    }

    fn open_file(&mut self, path: &Path) -> Result<(), ModelError> {
        let broken = |message: String| ModelError::Weights { path: path.to_owned(), message };
        let file = File::open(path).map_err(ModelError::io(path))?;
        let length = file.metadata().map_err(ModelError::io(path))?.len();
        // 1. The header: its length, then JSON.
        let mut prefix = [0; 8];
        file.read_exact_at(&mut prefix, 0).map_err(|_| broken("no safetensors header".into()))?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_HEADER_BYTES.min(length - 8) {
            return Err(broken(format!("a header of {header_bytes} bytes")));
        }
        let mut header = vec![0; usize::try_from(header_bytes).unwrap_or(0)];
        file.read_exact_at(&mut header, 8).map_err(ModelError::io(path))?;
        // Reading it checks that the tensors lie one after the other without a gap.
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| broken(error.to_string()))?;
        let data = 8 + header_bytes;
        if data + metadata.data_len() as u64 != length {
            return Err(broken(format!("{length} bytes do not hold the tensors of the header")));
        }
        // 2. Where each tensor is.
        let file = Arc::new(file);
        for (name, info) in metadata.tensors() {
            #[allow(clippy::wildcard_enum_match_arm)]
            let dtype = match info.dtype {
                Dtype::F32 => DType::F32,
                Dtype::BF16 => DType::BF16,
                Dtype::F16 => DType::F16,
                other => {
                    return Err(broken(format!(
                        "tensor {name:?} has dtype {other:?}; f32, f16 and bf16 are read"
                    )));
                }
            };
            let (start, shape) = (data + info.data_offsets.0 as u64, info.shape.clone());
            let (file, path) = (Arc::clone(&file), path.to_owned());
            self.tensors.insert(name, StoredTensor { file, path, start, dtype, shape });
        }
        Ok(())
    }
}

impl StoredTensor {
    /// Fills `bytes` from byte `offset` of the tensor on.
    pub(in crate::model) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ModelError> {
        self.file.read_exact_at(bytes, self.start + offset).map_err(ModelError::io(&self.path))
    }

    /// The tensor's bytes from its first to its last, some at a time.
    pub(in crate::model) fn for_each_bytes(
        &self,
        mut body: impl FnMut(&[u8]),
    ) -> Result<(), ModelError> {
        let length = self.shape.iter().product::<usize>() * self.dtype.size_in_bytes();
        let mut bytes = vec![0; READ_BYTES];
        for start in (0..length).step_by(READ_BYTES) {
            let part = &mut bytes[..READ_BYTES.min(length - start)];
            self.read(start as u64, part)?;
            body(part);
        }
        Ok(())
    }

    /// The whole tensor.
    pub(in crate::model) fn tensor(&self) -> Result<Tensor, ModelError> {
        let count: usize = self.shape.iter().product();
        let mut bytes = vec![0; count * self.dtype.size_in_bytes()];
        self.read(0, &mut bytes)?;
        Ok(Tensor::from_raw_buffer(&bytes, self.dtype, &self.shape, &Device::Cpu)?)
    }
}

fn shards(dir: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if single.exists() || !index.exists() {
        return Ok(vec![single]);
    }
    let broken = |message: String| ModelError::Weights { path: index.clone(), message };
    let text = fs::read_to_string(&index).map_err(ModelError::io(&index))?;
    let parsed: ShardIndex =
        serde_json::from_str(&text).map_err(|error| broken(error.to_string()))?;
    let names: BTreeSet<_> = parsed.weight_map.into_values().collect();
    if let Some(name) = names.iter().find(|name| Path::new(name).components().count() != 1) {
        return Err(broken(format!("shard {name:?} is not a file name")));
    }
    Ok(names.into_iter().map(|name| dir.join(name)).collect())
}
