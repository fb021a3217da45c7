//! One decoder layer: attention and a gated feed-forward, each behind a norm and a residual.

use candle_core::Tensor;

use super::{
    DeltaRows, Dropout, ModelConfig, ModelError, Projection, Site, kv_cache::attention_shape,
    step::Layout, weights::Parameters,
};
use crate::kernels::AttentionShape;
use crate::ops::{
    adapted_linear::adapted_linear,
    add::add,
    attention::{Panel, attention, paged_attention, write_cache},
    gated_mlp::silu_mul,
    linear::linear,
    lora::add_in_place,
    rms_norm::rms_norm,
    rope::{Angles, rope},
    weight::Weight,
};

/// A projection's weight `[out, in]` and bias `[out]`.
pub(super) struct Linear {
    pub(super) weight: Weight,
    pub(super) bias: Option<Tensor>,
}

/// What all layers of one step share.
pub(super) struct LayerContext<'a> {
    pub(super) angles: &'a Angles,
    pub(super) layout: &'a Layout<'a>,
    pub(super) deltas: &'a [DeltaRows],
    pub(super) dropout: Option<Dropout>,
}

/// One decoder layer.
pub(super) struct Layer {
    pub(super) index: usize,
    pub(super) input_norm: Tensor,
    pub(super) post_attention_norm: Tensor,
    /// In the order of [`Projection::ALL`].
    pub(super) projections: Vec<Linear>,
    pub(super) shape: AttentionShape,
    pub(super) eps: f64,
}

impl Layer {
    /// Builds layer `index`.
    pub(super) fn build(
        config: &ModelConfig,
        index: usize,
        parameters: &mut Parameters,
    ) -> Result<Self, ModelError> {
        let prefix = format!("model.layers.{index}");
        let mut projections = Vec::with_capacity(Projection::ALL.len());
        for projection in Projection::ALL {
            let (in_features, out_features) = config.projection_shape(projection);
            let name = format!("{prefix}.{}", projection.path());
            let has_bias = match projection {
                Projection::Q | Projection::K | Projection::V => config.qkv_bias,
                Projection::O => config.o_bias,
                Projection::Gate | Projection::Up | Projection::Down => config.mlp_bias,
            };
            let weight =
                parameters.matrix(&format!("{name}.weight"), [out_features, in_features])?;
            let bias = if has_bias {
                Some(parameters.vector(&format!("{name}.bias"), out_features)?)
            } else {
                None
            };
            projections.push(Linear { weight, bias });
        }
        let mut norm =
            |name: &str| parameters.vector(&format!("{prefix}.{name}.weight"), config.hidden_size);
        Ok(Self {
            index,
            input_norm: norm("input_layernorm")?,
            post_attention_norm: norm("post_attention_layernorm")?,
            projections,
            shape: attention_shape(config),
            eps: config.rms_norm_eps,
        })
    }

    /// `x [tokens, hidden]` -> the same shape.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        context: &LayerContext<'_>,
    ) -> Result<Tensor, ModelError> {
        // 1. Queries, keys and values of the normed input.
        let normed = rms_norm(x, &self.input_norm, self.eps)?;
        let q = self.project(Projection::Q, &normed, context)?;
        let k = self.project(Projection::K, &normed, context)?;
        let v = self.project(Projection::V, &normed, context)?;
        // 2. Positions.
        let (q, k) = (rope(&q, context.angles)?, rope(&k, context.angles)?);
        // 3. Attention, within the sequences or over the cache.
        let attended = match context.layout {
            Layout::Whole(sequences) => attention(&q, &k, &v, self.shape, sequences)?,
            Layout::Paged { cache, slots, spans } => {
                let (keys, values) = &cache.layers[self.index];
                write_cache(keys, Panel::Keys, &k, self.shape, slots)?;
                write_cache(values, Panel::Values, &v, self.shape, slots)?;
                paged_attention(&q, (keys, values), self.shape, spans)?
            }
        };
        let x = add(x, &self.project(Projection::O, &attended, context)?)?;
        // 4. The gated feed-forward of the normed sum.
        let normed = rms_norm(&x, &self.post_attention_norm, self.eps)?;
        let gate = self.project(Projection::Gate, &normed, context)?;
        let up = self.project(Projection::Up, &normed, context)?;
        let down = self.project(Projection::Down, &silu_mul(&gate, &up)?, context)?;
        Ok(add(&x, &down)?)
    }

    fn project(
        &self,
        projection: Projection,
        x: &Tensor,
        context: &LayerContext<'_>,
    ) -> Result<Tensor, ModelError> {
        let Linear { weight, bias } = &self.projections[projection as usize];
        let site = Site { layer: self.index, projection };
        // Training one adapter over a frozen weight, as one operation.
        if let (Weight::Packed(weight), [DeltaRows { rows, delta }]) = (weight, context.deltas)
            && *rows == (0..x.dim(0)?)
            && let Some(lora) = delta.trained(site, context.dropout)
        {
            return Ok(adapted_linear(x, weight, bias.as_ref(), &lora)?);
        }
        let mut out = linear(x, weight, bias.as_ref())?;
        // 1. Nothing is tracked: all adapters' rows at once, in place.
        if !out.track_op() && context.deltas.iter().all(|rows| rows.delta.is_frozen()) {
            let part = |DeltaRows { rows, delta }: &DeltaRows| {
                Some((rows.clone(), delta.part(site)?.clone()))
            };
            let segments: Vec<_> = context.deltas.iter().filter_map(part).collect();
            if !segments.is_empty() {
                add_in_place(&out, x, segments)?;
            }
            return Ok(out);
        }
        // 2. Training: one after the other, with a graph.
        for DeltaRows { rows, delta } in context.deltas {
            out = delta.apply(site, x, out, rows.clone(), context.dropout)?;
        }
        Ok(out)
    }
}
