//! One decoder layer: attention and a gated feed-forward, each behind a norm and a residual.

use candle_core::Tensor;

use super::{
    Delta, DeltaRows, Dropout, ModelConfig, ModelError, Projected, Projection, Site,
    inside::Inside,
    kv_cache::attention_shape,
    norm::{Norms, maybe, maybe_heads},
    step::Layout,
    weights::Parameters,
};
use crate::kernels::{AttentionShape, KvSide};
use crate::ops::{
    adapted_linear::adapted_linear,
    attention::{attention, paged_attention, write_cache},
    gated_mlp::Activation,
    in_place::{add, gated_mul, rope},
    linear::linear,
    lora::{LoraPart, add_in_place},
    profile::{self, Op},
    rope::Angles,
    served::{self, ServedProjection},
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
    pub(super) norms: Norms,
    /// In the order of [`Projection::ALL`].
    pub(super) projections: Vec<Linear>,
    pub(super) shape: AttentionShape,
    pub(super) activation: Activation,
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
        Ok(Self {
            index,
            norms: Norms::build(config, &prefix, parameters)?,
            projections,
            shape: attention_shape(config, index),
            activation: config.activation,
        })
    }

    /// `x [tokens, hidden]` -> the same shape.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        context: &LayerContext<'_>,
    ) -> Result<Tensor, ModelError> {
        Ok(self.forward_with_inside(x, context)?.0)
    }

    /// [`Self::forward`], and what was computed on the way.
    pub(super) fn forward_with_inside(
        &self,
        x: &Tensor,
        context: &LayerContext<'_>,
    ) -> Result<(Tensor, Inside), ModelError> {
        // 1. Queries, keys and values of the normed input.
        let attention_input = self.norms.attention_input.forward(x)?;
        let [q, k, v] =
            self.project([Projection::Q, Projection::K, Projection::V], &attention_input, context)?;
        let q = maybe_heads(self.norms.query.as_ref(), q)?;
        let k = maybe_heads(self.norms.key.as_ref(), k)?;
        // 2. Positions.
        let rotated_q = rope(q.clone(), context.angles)?;
        let rotated_k = rope(k.clone(), context.angles)?;
        // 3. Attention, within the sequences or over the cache.
        let attended = match context.layout {
            Layout::Whole(sequences) => {
                attention(&rotated_q, &rotated_k, &v, self.shape, sequences)?
            }
            Layout::Paged { cache, slots, spans } => {
                let (keys, values) = &cache.layers[self.index];
                write_cache(keys, KvSide::Keys, &rotated_k, self.shape, slots)?;
                write_cache(values, KvSide::Values, &v, self.shape, slots)?;
                paged_attention(&rotated_q, (keys, values), self.shape, spans)?
            }
        };
        let [attended] = self.project([Projection::O], &attended, context)?;
        let attended = maybe(self.norms.attention_output.as_ref(), attended)?;
        let middle = add(x, attended.clone())?;
        // 4. The gated feed-forward of the normed sum.
        let mlp_input = self.norms.mlp_input.forward(&middle)?;
        let [gate, up] = self.project([Projection::Gate, Projection::Up], &mlp_input, context)?;
        let gated = gated_mul(self.activation, gate.clone(), &up)?;
        let [down] = self.project([Projection::Down], &gated, context)?;
        let down = maybe(self.norms.mlp_output.as_ref(), down)?;
        let out = add(&middle, down.clone())?;
        let x = x.clone();
        let inside =
            Inside { x, attention_input, q, k, attended, middle, mlp_input, gate, up, gated, down };
        Ok((out, inside))
    }

    /// The outputs of projections of one input.
    fn project<const N: usize>(
        &self,
        projections: [Projection; N],
        x: &Tensor,
        context: &LayerContext<'_>,
    ) -> Result<[Tensor; N], ModelError> {
        let outputs = match self.serve(projections, x, context)? {
            Some(outputs) => outputs,
            None => projections
                .iter()
                .map(|projection| self.project_one(*projection, x, context))
                .collect::<Result<_, _>>()?,
        };
        Ok(outputs.try_into().expect("each projection has one output"))
    }

    /// All at once, with all adapters' sums; `None` where something is tracked or trained.
    fn serve(
        &self,
        projections: impl AsRef<[Projection]>,
        x: &Tensor,
        context: &LayerContext<'_>,
    ) -> Result<Option<Vec<Tensor>>, ModelError> {
        let projections = projections.as_ref();
        if x.track_op() || !context.deltas.iter().all(|rows| rows.delta.is_frozen()) {
            return Ok(None);
        }
        let mut served = Vec::with_capacity(projections.len());
        for projection in projections {
            let Linear { weight: held, bias } = &self.projections[*projection as usize];
            let Weight::Packed(weight) = held else { return Ok(None) };
            let site = Site { layer: self.index, projection: *projection };
            let with_part =
                context.deltas.iter().map(|rows| (rows.rows.clone(), rows.delta.part(site, held)));
            let parts = with_part.filter_map(|(rows, part)| Some((rows, part?))).collect();
            served.push(ServedProjection { weight, bias: bias.as_ref(), parts });
        }
        let mut outputs = served::projections(x, &served, op_of(projections[0]))?;
        // What is not done at once: one after the other.
        for (projection, out) in projections.iter().zip(&mut outputs) {
            let site = Site { layer: self.index, projection: *projection };
            let Linear { weight, bias } = &self.projections[*projection as usize];
            let at = Projected { site, weight, bias: bias.as_ref(), input: x };
            for DeltaRows { rows, delta } in context.deltas {
                if delta.part(site, weight).is_none() {
                    *out = delta.apply(&at, out.clone(), rows.clone(), context.dropout)?;
                }
            }
        }
        Ok(Some(outputs))
    }

    fn project_one(
        &self,
        projection: Projection,
        x: &Tensor,
        context: &LayerContext<'_>,
    ) -> Result<Tensor, ModelError> {
        let Linear { weight, bias } = &self.projections[projection as usize];
        let site = Site { layer: self.index, projection };
        let timer = profile::time(op_of(projection)).work(|| work(x, weight));
        // Training one adapter over a frozen weight, as one operation.
        if let (Weight::Packed(packed), [DeltaRows { rows, delta }]) = (weight, context.deltas)
            && *rows == (0..x.dim(0)?)
            && let Some(lora) = delta.trained(site, context.dropout)?
        {
            return Ok(adapted_linear(x, packed, bias.as_ref(), &lora)?);
        }
        let mut out = linear(x, weight, bias.as_ref())?;
        drop(timer);
        let frozen = !out.track_op() && context.deltas.iter().all(|rows| rows.delta.is_frozen());
        // 1. Nothing is tracked: the sums of all adapters' rows at once, in place.
        if frozen {
            let part = |DeltaRows { rows, delta }: &DeltaRows| {
                Some((rows.clone(), sum_at(delta.as_ref(), site, weight)?.clone()))
            };
            let segments: Vec<_> = context.deltas.iter().filter_map(part).collect();
            if !segments.is_empty() {
                add_in_place(&out, x, segments)?;
            }
        }
        // 2. Training, with a graph, and what is more than a sum: one after the other.
        let at = Projected { site, weight, bias: bias.as_ref(), input: x };
        for DeltaRows { rows, delta } in context.deltas {
            if !frozen || sum_at(delta.as_ref(), site, weight).is_none() {
                out = delta.apply(&at, out, rows.clone(), context.dropout)?;
            }
        }
        Ok(out)
    }
}

/// What a frozen adapter adds, where that does not depend on the base's product.
fn sum_at<'a>(delta: &'a dyn Delta, site: Site, weight: &Weight) -> Option<&'a LoraPart> {
    delta.part(site, weight).filter(|part| part.is_sum())
}

/// The part of a step that a projection belongs to.
fn op_of(projection: Projection) -> Op {
    match projection {
        Projection::Q | Projection::K | Projection::V => Op::Qkv,
        Projection::O => Op::Output,
        Projection::Gate | Projection::Up => Op::GateUp,
        Projection::Down => Op::Down,
    }
}

/// Bytes and operations of a product with `weight`.
pub(super) fn work(x: &Tensor, weight: &Weight) -> (usize, usize) {
    (weight.num_bytes(), 2 * x.dims()[0] * weight.elem_count())
}
