//! What the traces of other trainers hold: rows, and the adapter at the end.

use std::path::Path;

use serde_json::Value;
use tunesmith::{adapters::LoraAdapter, data::Example, model::ModelConfig};

use super::jobs::row;

/// A row of a trace: tokens with a mask, or a prompt with two answers, which are trained.
pub(crate) fn example(value: &Value) -> Example {
    let tokens = |key: &str| -> Vec<u32> { serde_json::from_value(value[key].clone()).unwrap() };
    if value["prompt_ids"].is_null() {
        let mask: Vec<u8> = serde_json::from_value(value["loss_mask"].clone()).unwrap();
        return row(0, tokens("tokens"), mask.into_iter().map(|counts| counts == 1).collect());
    }
    let prompt = tokens("prompt_ids");
    let side = |key: &str| {
        let all = [prompt.clone(), tokens(key)].concat();
        let mask = (0..all.len()).map(|at| at >= prompt.len()).collect();
        row(0, all, mask)
    };
    Example { rejected: Some(Box::new(side("rejected_ids"))), ..side("chosen_ids") }
}

/// The largest difference between any A or B of `theirs` and of `ours`, two adapters of a model.
pub(crate) fn difference(model_dir: &Path, ours: &Path, theirs: &Path) -> f32 {
    let config = ModelConfig::from_dir(model_dir).unwrap();
    let read = |dir: &Path| LoraAdapter::read(dir, &config, false).unwrap();
    let (ours, theirs) = (read(ours), read(theirs));
    let mut largest = 0.0_f32;
    for (site, module) in theirs.modules() {
        let own = &ours.modules()[site];
        for (theirs, ours) in module.matrices().unwrap().into_iter().zip(own.matrices().unwrap()) {
            let difference = (theirs - ours).unwrap().abs().unwrap().max_all().unwrap();
            largest = largest.max(difference.to_scalar().unwrap());
        }
    }
    largest
}
