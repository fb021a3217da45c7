//! Bodies of `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`.

use serde::Deserialize;
use serde_json::Value;

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct LoadAdapterRequest {
    pub(crate) lora_name: Option<String>,
    pub(crate) lora_path: Option<String>,
    pub(crate) load_inplace: Option<bool>,
    pub(crate) is_3d_lora_weight: Option<bool>,
    // Known, not supported: a load that ignored them would do something else than was asked.
    pub(crate) expected_version: Option<Value>,
    pub(crate) sha256: Option<Value>,
    pub(crate) activate: Option<Value>,
    pub(crate) pin: Option<Value>,
    pub(crate) dry_run: Option<Value>,
    pub(crate) scale: Option<Value>,
    pub(crate) revision: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct UnloadAdapterRequest {
    pub(crate) lora_name: Option<String>,
    pub(crate) mode: Option<String>,
    pub(crate) timeout_s: Option<f64>,
    // Known, not supported.
    pub(crate) expected_version: Option<Value>,
}
