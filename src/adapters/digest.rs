//! An adapter's identity: a hash of exactly what decides its part of the forward pass.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{AdapterError, module::RawModule, tables::Tables, variant::Variant};
use crate::model::Site;
use crate::publish::sha256_hex;

/// SHA-256 over the hashes of every tensor in the order of names, each over name, shape, scale and
/// f32 bytes. Neither the dtype in the file or in memory nor fields that only describe enter it.
pub(super) fn digest(
    modules: &BTreeMap<Site, RawModule>,
    (variant, use_rslora): (&Variant, bool),
    tables: &Tables,
) -> Result<String, AdapterError> {
    let mut hashes = BTreeMap::new();
    let mut add = |name: String, tensor: &Tensor, more: &[u8]| {
        let shape = format!("{:?}", tensor.dims());
        // The name's length first, so that no two tensors give one byte string.
        let length = (name.len() as u64).to_le_bytes();
        let data = f32_bytes(tensor)?;
        let hash = sha256_hex(&[length.as_slice(), name.as_bytes(), shape.as_bytes(), more, &data]);
        hashes.insert(name, hash);
        Ok::<_, AdapterError>(())
    };
    for (site, module) in modules {
        let scale = module.scale(use_rslora)?.to_le_bytes();
        for (name, tensor) in module.named(*site, variant) {
            add(name, tensor, &scale)?;
        }
    }
    // Which tokens the rows are, the tensors do not say.
    let fields = tables.peft_fields().map(|(_, value)| value.to_string()).concat();
    for (name, tensor) in tables.named()? {
        add(name, &tensor, fields.as_bytes())?;
    }
    let hashes: Vec<&[u8]> = hashes.values().map(String::as_bytes).collect();
    Ok(sha256_hex(&hashes))
}

/// The elements of an f32 tensor in row-major order, little-endian.
pub(super) fn f32_bytes(tensor: &Tensor) -> Result<Vec<u8>, AdapterError> {
    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect())
}
