//! The mean of a matrix's rows: of an output head, what gives the mean logit of a hidden state.

use candle_core::Result;

use super::{storage::tensor, weight::Weight};

/// The mean over the rows of `weight [rows, columns]`, as `[1, columns]`, f32. A plain matrix receives a
/// gradient.
///
/// # Errors
/// A failed tensor operation.
pub fn mean_row(weight: &Weight) -> Result<candle_core::Tensor> {
    let (rows, columns) = weight.dims2()?;
    match weight {
        Weight::Plain(weight) => weight.mean_keepdim(0),
        Weight::Packed(weight) => {
            let (mut sum, mut row) = (vec![0.0_f64; columns], vec![0.0; columns]);
            for index in 0..rows {
                weight.row(index, &mut row);
                sum.iter_mut().zip(&row).for_each(|(sum, value)| *sum += f64::from(*value));
            }
            let mean = sum.into_iter().map(|sum| (sum / rows as f64) as f32).collect();
            tensor(mean, (1, columns))
        }
    }
}
