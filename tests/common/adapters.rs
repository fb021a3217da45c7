//! Adapter folders for the tests: fixtures, scratch folders, and tensor files written by hand so that
//! they can be wrong.
#![allow(dead_code)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use serde_json::Value;
use tunesmith::{
    adapters::{LoraAdapter, LoraConfig},
    model::{ModelConfig, Projection},
};

pub(crate) const MODELS: [&str; 2] = ["tiny-llama", "tiny-qwen2"];

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A folder of what peft and transformers computed.
pub(crate) fn oracle(name: &str) -> PathBuf {
    fixture("oracle").join(name)
}

pub(crate) fn model(name: &str) -> ModelConfig {
    ModelConfig::from_dir(&fixture(name)).unwrap()
}

/// A folder of one's own, removed at the end of the test.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("adapters-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// A copy of a folder's files.
    pub(crate) fn copy(&self, source: &Path, name: &str) -> PathBuf {
        let target = self.0.join(name);
        fs::create_dir_all(&target).unwrap();
        for entry in fs::read_dir(source).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), target.join(entry.file_name())).unwrap();
        }
        target
    }

    /// A fresh adapter for tiny-llama; the seed decides its weights.
    pub(crate) fn adapter(&self, name: &str, seed: u64) -> PathBuf {
        let dir = self.0.join(name);
        fs::create_dir_all(&dir).unwrap();
        fresh(seed).write(&dir, "base").unwrap();
        dir
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn config() -> LoraConfig {
    LoraConfig {
        rank: 4,
        alpha: 8.0,
        dropout: 0.05,
        targets: Projection::ALL.to_vec(),
        ..LoraConfig::default()
    }
}

pub(crate) fn fresh(seed: u64) -> LoraAdapter {
    LoraAdapter::fresh(&config(), &model("tiny-llama"), seed).unwrap()
}

/// Sets one field of an adapter's adapter_config.json.
pub(crate) fn set_field(dir: &Path, field: &str, value: Value) {
    let path = dir.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[field] = value;
    fs::write(&path, config.to_string()).unwrap();
}

/// A tensor as it stands in a file.
#[derive(Clone)]
pub(crate) struct RawTensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u8>,
}

/// The tensors of an adapter folder, all f32, in the order of their names.
pub(crate) fn read_raw(dir: &Path) -> Vec<RawTensor> {
    let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<RawTensor> = file
        .iter()
        .map(|(name, view)| RawTensor {
            name: name.to_owned(),
            dtype: "F32",
            shape: view.shape().to_vec(),
            data: view.data().to_vec(),
        })
        .collect();
    tensors.sort_by(|left, right| left.name.cmp(&right.name));
    tensors
}

/// Writes tensors as told, also two of one name.
pub(crate) fn write_raw(dir: &Path, tensors: &[RawTensor]) {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        data.extend_from_slice(&tensor.data);
        entries.push(format!(
            r#"{:?}:{{"dtype":{:?},"shape":{:?},"data_offsets":[{start},{}]}}"#,
            tensor.name,
            tensor.dtype,
            tensor.shape,
            data.len()
        ));
    }
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(&data);
    fs::write(dir.join("adapter_model.safetensors"), bytes).unwrap();
}
