//! Folding an adapter into the weights of its base, and writing the whole model.

use std::{collections::BTreeMap, io, path::Path};

use candle_core::{DType, Tensor};

use super::{AdapterError, LoraAdapter, LoraModule, site::site_key};
use crate::publish::disk;

/// The file of a model that is written in one piece.
const WEIGHTS_FILE: &str = "model.safetensors";

/// The base's weights with the adapter folded in: `W + scale * B A`, computed in f32, in the
/// weight's dtype. `weights` are checkpoint names and tensors, as `Decoder::tensors` gives them.
///
/// # Errors
/// `MissingTensor` if the base lacks a weight that the adapter changes; `Candle` if shapes differ.
pub fn merged_weights(
    weights: Vec<(String, Tensor)>,
    adapter: &LoraAdapter,
) -> Result<Vec<(String, Tensor)>, AdapterError> {
    let mut waiting: BTreeMap<String, &LoraModule> = adapter
        .modules()
        .iter()
        .map(|(site, module)| (format!("{}.weight", site_key(*site)), module))
        .collect();
    let mut merged = Vec::with_capacity(weights.len());
    for (name, weight) in weights {
        let weight = match waiting.remove(&name) {
            Some(module) => fold(&weight, module)?,
            None => weight,
        };
        merged.push((name, weight));
    }
    if waiting.is_empty() {
        return Ok(merged);
    }
    Err(AdapterError::MissingTensor { tensors: waiting.into_keys().collect() })
}

/// Writes `model.safetensors` of a Hub-layout folder.
///
/// # Errors
/// `Io`.
pub fn write_weights(dir: &Path, weights: &[(String, Tensor)]) -> Result<(), AdapterError> {
    let path = dir.join(WEIGHTS_FILE);
    let views: Vec<(&str, &Tensor)> =
        weights.iter().map(|(name, weight)| (name.as_str(), weight)).collect();
    // transformers asks for the format before it reads.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    Ok(disk::write_with(&path, || {
        safetensors::serialize_to_file(views, Some(metadata), &path).map_err(io::Error::other)
    })?)
}

/// `W + scale * B A`. `[out, in]`
fn fold(weight: &Tensor, module: &LoraModule) -> candle_core::Result<Tensor> {
    let product = module.b.detach().matmul(&module.a.detach())?;
    let delta = (product * module.scale)?;
    (weight.to_dtype(DType::F32)? + delta)?.to_dtype(weight.dtype())
}
