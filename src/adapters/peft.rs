//! PEFT folders: adapter_config.json and adapter_model.safetensors, read strictly, written so that
//! peft, vLLM and others read them. Knows the format; never knows who asks.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use candle_core::Tensor;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Map, Value, json};

use super::{
    AdapterError, LoraAdapter, LoraModule,
    digest::f32_bytes,
    files::{LoadLimits, read_file, read_tensors},
    lora::LoraParts,
    module::RawModule,
    peft_config::PeftConfig,
    site::{Matrix, all_sites, site_key, tensor_name, vector_name},
    tables::{self, Shares},
    variant::{VARIANTS, Variant},
};
use crate::model::{ModelConfig, Projection, Site};
use crate::ops::lora_dtype::LoraDtype;
use crate::publish::disk;

const CONFIG_FILE: &str = "adapter_config.json";
const TENSOR_FILE: &str = "adapter_model.safetensors";
/// What older versions of PEFT and others wrote instead.
const PICKLE_FILES: &[&str] =
    &["adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "pytorch_model.bin"];
const PICKLE_EXTENSIONS: &[&str] = &["bin", "pt", "pth", "pkl", "ckpt"];
/// Largest adapter_config.json that is read, in bytes.
const CONFIG_BYTES_LIMIT: u64 = 1 << 20;

impl LoraAdapter {
    /// Reads a PEFT folder strictly into memory (never mmapped); every tensor must be used, and every
    /// targeted module must have both of its own. Trainable variables if `trainable`.
    ///
    /// # Errors
    /// Every reason to refuse but `WrongBase`, which [`check_base`](super::check_base) finds.
    pub fn read(dir: &Path, model: &ModelConfig, trainable: bool) -> Result<Self, AdapterError> {
        Self::read_parts(dir, model, trainable, (&LoadLimits::default(), LoraDtype::Auto))
    }

    /// A frozen adapter within other limits, whose A and B are held as `dtype` has it.
    ///
    /// # Errors
    /// As [`read`](Self::read); `OutOfRange` for values that are too large for `dtype`.
    pub fn read_as(
        dir: &Path,
        model: &ModelConfig,
        dtype: LoraDtype,
        limits: &LoadLimits,
    ) -> Result<Self, AdapterError> {
        Self::read_parts(dir, model, false, (limits, dtype))
    }

    fn read_parts(
        dir: &Path,
        model: &ModelConfig,
        trainable: bool,
        (limits, dtype): (&LoadLimits, LoraDtype),
    ) -> Result<Self, AdapterError> {
        refuse_pickle(dir)?;
        let config_path = dir.join(CONFIG_FILE);
        let bytes = read_file(&config_path, CONFIG_BYTES_LIMIT)?;
        let config = PeftConfig::parse(&config_path, &bytes)?;
        let sites = config.targeted(&all_sites(model))?;
        for site in &sites {
            let module = site_key(*site);
            let rank = config.rank(&module)?;
            if rank > limits.rank {
                return Err(AdapterError::RankTooLarge { module, rank, limit: limits.rank });
            }
        }
        let shares = config.shares(model)?;
        let mut tensors = read_tensors(&dir.join(TENSOR_FILE), limits)?;
        check_names(&sites, config.variant, &shares, &tensors)?;
        let mut modules = BTreeMap::new();
        for site in sites {
            let (inputs, outputs) = model.projection_shape(site.projection);
            let key = site_key(site);
            let rank = config.rank(&key)?;
            let a = take(&mut tensors, tensor_name(site, Matrix::A), &[rank, inputs])?;
            let b = take(&mut tensors, tensor_name(site, Matrix::B), &[outputs, rank])?;
            let vector = match config.variant.vector {
                Some(name) => Some(take(&mut tensors, vector_name(site, name), &[outputs])?),
                None => None,
            };
            modules.insert(site, RawModule { a, b, vector, alpha: config.alpha(&key)? });
        }
        let parts = LoraParts {
            modules,
            variant: config.variant,
            tables: (shares, tensors),
            dropout: config.dropout,
            use_rslora: config.use_rslora,
            trainable,
            dtype,
        };
        Self::from_parts(parts, model)
    }

    /// Writes adapter_config.json and adapter_model.safetensors into an existing folder (the caller
    /// publishes it), in f32 and with the values of this moment.
    ///
    /// # Errors
    /// `Io`; `Candle` if a tensor cannot be read.
    pub fn write(&self, dir: &Path, base_model_name_or_path: &str) -> Result<(), AdapterError> {
        let config_path = dir.join(CONFIG_FILE);
        let failed = |source| AdapterError::Io { path: config_path.clone(), source };
        let config = self.peft_config(base_model_name_or_path);
        let mut text =
            serde_json::to_string_pretty(&config).map_err(|error| failed(error.into()))?;
        text.push('\n');
        disk::write(&config_path, text)?;

        let mut bytes = BTreeMap::new();
        for (name, tensor) in self.named()? {
            bytes.insert(name, (tensor.dims().to_vec(), f32_bytes(&tensor)?));
        }
        let path = dir.join(TENSOR_FILE);
        let failed = |error: safetensors::SafeTensorError| AdapterError::Io {
            path: path.clone(),
            source: std::io::Error::other(error),
        };
        let mut views = Vec::new();
        for (name, (shape, data)) in &bytes {
            let view = TensorView::new(Dtype::F32, shape.clone(), data).map_err(failed)?;
            views.push((name, view));
        }
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let file = safetensors::serialize(views, Some(metadata)).map_err(failed)?;
        Ok(disk::write(&path, file)?)
    }

    /// What most modules have stands in `r` and `lora_alpha`; the others are listed one by one.
    fn peft_config(&self, base_model_name_or_path: &str) -> Value {
        let rank = most_common(self.modules().values().map(LoraModule::rank)).unwrap_or(0);
        let alpha = most_common(self.modules().values().map(|module| module.alpha.to_bits()))
            .map_or(0.0, f64::from_bits);
        let mut rank_pattern = Map::new();
        let mut alpha_pattern = Map::new();
        for (site, module) in self.modules() {
            if module.rank() != rank {
                rank_pattern.insert(site_key(*site), module.rank().into());
            }
            if module.alpha.to_bits() != alpha.to_bits() {
                alpha_pattern.insert(site_key(*site), number(module.alpha));
            }
        }
        let mut config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model_name_or_path,
            "revision": null,
            "inference_mode": true,
            "r": rank,
            "lora_alpha": number(alpha),
            "lora_dropout": self.dropout,
            "bias": "none",
            "fan_in_fan_out": false,
            "use_rslora": self.use_rslora,
            "init_lora_weights": true,
            "target_modules": self.target_modules(),
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "layers_to_transform": null,
            "layers_pattern": null,
        });
        for variant in VARIANTS {
            if let Some(field) = variant.field {
                config[field] = (variant.name == self.variant.name).into();
            }
        }
        for (field, value) in self.tables().peft_fields() {
            config[field] = value;
        }
        config
    }

    /// Names of projections if all layers have them, else full paths.
    fn target_modules(&self) -> Vec<String> {
        let projections: BTreeSet<Projection> =
            self.modules().keys().map(|site| site.projection).collect();
        if self.modules().len() == projections.len() * self.num_layers {
            return projections.into_iter().map(|p| p.name().to_owned()).collect();
        }
        self.modules().keys().map(|site| site_key(*site)).collect()
    }
}

fn refuse_pickle(dir: &Path) -> Result<(), AdapterError> {
    let is_pickle = dir.extension().is_some_and(|ext| PICKLE_EXTENSIONS.iter().any(|p| ext == *p));
    if is_pickle && dir.is_file() {
        return Err(AdapterError::Pickle { path: dir.to_owned() });
    }
    if !dir.is_dir() {
        return Err(AdapterError::NotFound { path: dir.to_owned() });
    }
    if dir.join(TENSOR_FILE).exists() {
        return Ok(());
    }
    match PICKLE_FILES.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
        Some(path) => Err(AdapterError::Pickle { path }),
        None => Ok(()),
    }
}

/// Every tensor has a place, every place has its tensors.
fn check_names(
    sites: &[Site],
    variant: &Variant,
    shares: &Shares,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<(), AdapterError> {
    let mut expected = tables::tensor_names(shares);
    for site in sites {
        expected.extend([Matrix::A, Matrix::B].map(|matrix| tensor_name(*site, matrix)));
        expected.extend(variant.vector.map(|vector| vector_name(*site, vector)));
    }
    let unmatched: Vec<String> =
        tensors.keys().filter(|name| !expected.contains(*name)).cloned().collect();
    if !unmatched.is_empty() {
        return Err(AdapterError::UnmatchedTensor { tensors: unmatched });
    }
    let missing: Vec<String> =
        expected.into_iter().filter(|name| !tensors.contains_key(name)).collect();
    if !missing.is_empty() {
        return Err(AdapterError::MissingTensor { tensors: missing });
    }
    Ok(())
}

fn take(
    tensors: &mut BTreeMap<String, Tensor>,
    name: String,
    expected: &[usize],
) -> Result<Tensor, AdapterError> {
    let Some(tensor) = tensors.remove(&name) else {
        return Err(AdapterError::MissingTensor { tensors: vec![name] });
    };
    if tensor.dims() != expected {
        let (expected, found) = (expected.to_vec(), tensor.dims().to_vec());
        return Err(AdapterError::WrongShape { tensor: name, expected, found });
    }
    Ok(tensor)
}

fn most_common<T: Ord>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: BTreeMap<T, usize> = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    counts.into_iter().max_by_key(|(_, count)| *count).map(|(value, _)| value)
}

/// Whole numbers without a fraction: some readers want an integer for `lora_alpha`.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}
