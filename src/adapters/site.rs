//! How PEFT names the sites of a model and the tensors of an adapter.

use crate::model::{ModelConfig, Projection, Site};

/// The two matrices of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Matrix {
    A,
    B,
}

/// Every site of a model, in the order of the forward pass.
pub(super) fn all_sites(model: &ModelConfig) -> Vec<Site> {
    let layer_sites =
        |layer| Projection::ALL.into_iter().map(move |projection| Site { layer, projection });
    (0..model.num_layers).flat_map(layer_sites).collect()
}

/// The module's path in the model: "model.layers.0.self_attn.q_proj".
pub(super) fn site_key(site: Site) -> String {
    format!("model.layers.{}.{}", site.layer, site.projection.path())
}

/// The tensor's name in a PEFT file.
pub(super) fn tensor_name(site: Site, matrix: Matrix) -> String {
    let matrix = match matrix {
        Matrix::A => "lora_A",
        Matrix::B => "lora_B",
    };
    format!("base_model.model.{}.{matrix}.weight", site_key(site))
}

/// The name of a variant's vector in a PEFT file.
pub(super) fn vector_name(site: Site, vector: &str) -> String {
    format!("base_model.model.{}.{vector}", site_key(site))
}
