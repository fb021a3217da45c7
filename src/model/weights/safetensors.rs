//! `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::model::ModelError;

/// The tensors of a folder, each in its file's dtype.
pub(in crate::model) struct SafetensorsFolder {
    tensors: BTreeMap<String, (Tensor, PathBuf)>,
    dir: PathBuf,
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

    /// Reads every tensor once.
    pub(in crate::model) fn read(dir: &Path) -> Result<Self, ModelError> {
        let mut folder = Self { tensors: BTreeMap::new(), dir: dir.to_owned() };
        for path in shards(dir)? {
            folder.read_file(&path)?;
        }
        Ok(folder)
    }

    /// Takes a tensor out, checking its shape.
    pub(in crate::model) fn take(
        &mut self,
        name: &str,
        shape: &[usize],
    ) -> Result<Tensor, ModelError> {
        let broken = |path: PathBuf, message: String| ModelError::Weights { path, message };
        let (tensor, path) = self
            .tensors
            .remove(name)
            .ok_or_else(|| broken(self.dir.clone(), format!("tensor {name:?} is missing")))?;
        if tensor.dims() == shape {
            return Ok(tensor);
        }
        let has = tensor.dims();
        Err(broken(
            path,
            format!("tensor {name:?} has shape {has:?}, config.json asks for {shape:?}"),
        ))
    }

    fn read_file(&mut self, path: &Path) -> Result<(), ModelError> {
        let broken = |message: String| ModelError::Weights { path: path.to_owned(), message };
        let file = File::open(path).map_err(ModelError::io(path))?;
        // SAFETY: the mapping is read once, right here, and dropped at the end of this function;
        // base models are not rewritten in place while they are loaded.
        #[allow(unsafe_code)]
        let mapping = unsafe { memmap2::Mmap::map(&file) }.map_err(ModelError::io(path))?;
        let views =
            SafeTensors::deserialize(&mapping).map_err(|error| broken(error.to_string()))?;
        for (name, view) in views.iter() {
            #[allow(clippy::wildcard_enum_match_arm)]
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::BF16 => DType::BF16,
                Dtype::F16 => DType::F16,
                other => {
                    return Err(broken(format!(
                        "tensor {name:?} has dtype {other:?}; f32, f16 and bf16 are read"
                    )));
                }
            };
            let tensor = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?;
            self.tensors.insert(name.to_owned(), (tensor, path.to_owned()));
        }
        Ok(())
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
