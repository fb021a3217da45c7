//! How the next token is to be chosen: the fields of a chat request that say so, checked.

use super::{
    error::ApiError,
    generation::{in_range, within},
    types::chat::ChatCompletionRequest,
};
use crate::engine::SamplingParams;

const MAX_TOP_LOGPROBS: i64 = 20;

/// Everything between a row of logits and a token.
///
/// # Errors
/// 400 naming the field that is out of range.
pub(super) fn valid_sampling(
    wire: &ChatCompletionRequest,
    seed: u64,
) -> Result<SamplingParams, ApiError> {
    let top_p = within("top_p", wire.top_p.unwrap_or(1.0), 0.0, 1.0)?;
    if top_p == 0.0 {
        return Err(ApiError::invalid("top_p", "`top_p` must be greater than 0"));
    }
    let repetition = wire.repetition_penalty.unwrap_or(1.0);
    if repetition <= 0.0 {
        let message = "`repetition_penalty` must be greater than 0";
        return Err(ApiError::invalid("repetition_penalty", message));
    }
    let penalty = |name, value: Option<f64>| within(name, value.unwrap_or(0.0), -2.0, 2.0);
    Ok(SamplingParams {
        temperature: within("temperature", wire.temperature.unwrap_or(1.0), 0.0, 2.0)?,
        top_p,
        // -1 is the other customary way to say "off".
        top_k: in_range("top_k", wire.top_k.unwrap_or(0), -1, i64::from(u32::MAX))?.max(0) as usize,
        min_p: within("min_p", wire.min_p.unwrap_or(0.0), 0.0, 1.0)?,
        presence_penalty: penalty("presence_penalty", wire.presence_penalty)?,
        frequency_penalty: penalty("frequency_penalty", wire.frequency_penalty)?,
        repetition_penalty: within("repetition_penalty", repetition, 0.0, 10.0)?,
        logit_bias: valid_bias(wire)?,
        seed,
        stream: 0,
    })
}

/// `Some` where log-probabilities are wanted, with the number of most likely tokens.
///
/// # Errors
/// 400 for `top_logprobs` out of range or without `logprobs`.
pub(super) fn valid_logprobs(
    wanted: Option<bool>,
    top: Option<i64>,
) -> Result<Option<usize>, ApiError> {
    let top = in_range("top_logprobs", top.unwrap_or(0), 0, MAX_TOP_LOGPROBS)?;
    if wanted == Some(true) {
        return Ok(Some(top as usize));
    }
    if top > 0 {
        let message = "`top_logprobs` needs `logprobs` to be true";
        return Err(ApiError::invalid("top_logprobs", message));
    }
    Ok(None)
}

fn valid_bias(wire: &ChatCompletionRequest) -> Result<Vec<(u32, f32)>, ApiError> {
    let bias = wire.logit_bias.iter().flatten();
    bias.map(|(token, bias)| {
        let id = token.parse().map_err(|_| {
            let message = format!("`logit_bias` names {token:?}, which is not a token id");
            ApiError::invalid("logit_bias", message)
        })?;
        Ok((id, within("logit_bias", *bias, -100.0, 100.0)?))
    })
    .collect()
}
