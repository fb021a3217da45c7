//! The course of a run as numbers for the card and as a picture: the loss curve in SVG.

use std::fmt::Write as _;

use super::TrainEvent;
use crate::adapters::CurvePoint;

/// Loss of the newest step.
pub(super) fn last_loss(events: &[TrainEvent]) -> Option<f64> {
    train_points(events).last().map(|&(_, loss)| loss)
}

/// So few steps before a spike have a median that says something.
const MIN_CALM_STEPS: usize = 3;

/// Whether the losses of the last `steps` steps are all above `factor` times the median of the up to
/// `window` steps before them, and were not a step earlier: that median and the newest loss. At least
/// three steps must come before.
pub(super) fn spike(
    events: &[TrainEvent],
    window: usize,
    factor: f64,
    steps: usize,
) -> Option<(f64, f64)> {
    let losses = events.iter().rev().filter_map(|event| {
        let TrainEvent::Step { loss, .. } = event else { return None };
        Some(*loss)
    });
    let newest: Vec<f64> = losses.take(steps + window).collect();
    if steps == 0 || newest.len() < steps + MIN_CALM_STEPS {
        return None;
    }
    let (high, before) = newest.split_at(steps);
    let mut sorted = before.to_vec();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[sorted.len() / 2];
    let limit = factor * median;
    // Said once: when the last of the steps comes in, or at the first step at which it can be said.
    let is_new = before[0] <= limit || before.len() == MIN_CALM_STEPS;
    (is_new && high.iter().all(|loss| *loss > limit)).then_some((median, high[0]))
}

/// The newest loss, if it and those of the `steps - 1` steps before are above 0 and all their gradients
/// are exactly 0. A learning rate that is far too high does that: activations saturate and nothing that
/// is trained reaches the loss. A loss of 0 with no gradient is a run that is done.
pub(super) fn no_slope(events: &[TrainEvent], steps: usize) -> Option<f64> {
    let newest = events.iter().rev().filter_map(|event| {
        let TrainEvent::Step { loss, grad_norm, .. } = event else { return None };
        Some((*loss, *grad_norm))
    });
    let newest: Vec<(f64, f64)> = newest.take(steps).collect();
    let is_dead = |(loss, norm): &(f64, f64)| *norm == 0.0 && *loss > 0.0;
    (newest.len() == steps && newest.iter().all(is_dead)).then(|| newest[0].0)
}

/// The step whose validation was the best, if that is what is published.
pub(super) fn best_step(events: &[TrainEvent]) -> Option<usize> {
    events.iter().rev().find_map(|event| {
        let TrainEvent::Best { step, .. } = event else { return None };
        Some(*step)
    })
}

/// Loss and token accuracy of the validation over all rows of what is published: the newest, unless the
/// best was kept.
pub(super) fn last_validation(events: &[TrainEvent]) -> Option<(f64, f64)> {
    let best = best_step(events);
    events.iter().rev().find_map(|event| {
        let TrainEvent::Validated { step, full: true, loss, token_accuracy, .. } = event else {
            return None;
        };
        best.is_none_or(|best| best == *step).then_some((*loss, *token_accuracy))
    })
}

/// Steps and validations for the card, in their order.
pub(super) fn curve(events: &[TrainEvent]) -> Vec<CurvePoint> {
    let mut curve: Vec<CurvePoint> = Vec::new();
    for event in events {
        if let TrainEvent::Step { step, loss, learning_rate, .. } = event {
            let (loss, learning_rate) = (Some(*loss), Some(*learning_rate));
            curve.push(CurvePoint {
                step: *step as u64,
                loss,
                learning_rate,
                ..Default::default()
            });
        }
        if let TrainEvent::Validated { loss, token_accuracy, .. } = event
            && let Some(point) = curve.last_mut()
        {
            point.validation_loss = Some(*loss);
            point.validation_accuracy = Some(*token_accuracy);
        }
    }
    curve
}

fn train_points(events: &[TrainEvent]) -> Vec<(usize, f64)> {
    let point = |event: &TrainEvent| {
        let TrainEvent::Step { step, loss, .. } = event else { return None };
        Some((*step, *loss))
    };
    events.iter().filter_map(point).collect()
}

fn valid_points(events: &[TrainEvent]) -> Vec<(usize, f64)> {
    let point = |event: &TrainEvent| {
        let TrainEvent::Validated { step, loss, .. } = event else { return None };
        Some((*step, *loss))
    };
    events.iter().filter_map(point).collect()
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
/// Left, right, top and bottom border of the plot.
const BORDER: [f64; 4] = [64.0, 24.0, 52.0, 48.0];

/// The loss over the steps: every step thin, their running mean bold, validation as dots.
#[must_use]
pub fn loss_curve_svg(events: &[TrainEvent]) -> String {
    let (train, valid) = (train_points(events), valid_points(events));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let axes = Axes::around(train.iter().chain(&valid));
    axes.draw(&mut svg, unit(events));
    let smooth = running_mean(&train);
    axes.line(&mut svg, &train, "stroke=\"#9cc2e5\" stroke-width=\"1\"");
    axes.line(&mut svg, &smooth, "stroke=\"#1f6fb4\" stroke-width=\"2.2\"");
    axes.line(&mut svg, &valid, "stroke=\"#d9480f\" stroke-width=\"1.6\" stroke-dasharray=\"5 4\"");
    for &(step, loss) in &valid {
        let (x, y) = axes.place(step as f64, loss);
        let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"#d9480f\"/>");
    }
    legend(&mut svg, &train, &valid);
    svg.push_str("</svg>\n");
    svg
}

/// What a loss is a mean of.
fn unit(events: &[TrainEvent]) -> &'static str {
    let of_pairs = |event: &TrainEvent| matches!(event, TrainEvent::Step { rewards: Some(_), .. });
    if events.iter().any(of_pairs) { "per pair" } else { "nats per token" }
}

/// The part of the plane that is shown, with round numbers at its ticks.
struct Axes {
    steps: Ticks,
    losses: Ticks,
}

/// Evenly spaced round numbers from `first` to `last`.
struct Ticks {
    first: f64,
    last: f64,
    distance: f64,
}

impl Axes {
    fn around<'a>(points: impl Iterator<Item = &'a (usize, f64)>) -> Self {
        let (mut last_step, mut lowest, mut highest) = (1.0_f64, f64::MAX, f64::MIN);
        for &(step, loss) in points {
            last_step = last_step.max(step as f64);
            (lowest, highest) = (lowest.min(loss), highest.max(loss));
        }
        if lowest > highest {
            (lowest, highest) = (0.0, 1.0);
        }
        Self { steps: Ticks::over(0.0, last_step, 8.0), losses: Ticks::over(lowest, highest, 6.0) }
    }

    /// Where a step and a loss are in the picture.
    fn place(&self, step: f64, loss: f64) -> (f64, f64) {
        let [left, right, top, bottom] = BORDER;
        let across = self.steps.share(step) * (WIDTH - left - right);
        let down = (1.0 - self.losses.share(loss)) * (HEIGHT - top - bottom);
        (left + across, top + down)
    }

    /// Grid, numbers and names.
    fn draw(&self, svg: &mut String, unit: &str) {
        let (left, bottom) = self.place(self.steps.first, self.losses.first);
        let (right, top) = self.place(self.steps.last, self.losses.last);
        for loss in self.losses.values() {
            let (_, y) = self.place(0.0, loss);
            let text = self.losses.label(loss);
            let _ = writeln!(
                svg,
                "<path d=\"M{left:.1} {y:.1}H{right:.1}\" stroke=\"#e6e9ec\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#5c6670\">{text}</text>",
                left - 8.0,
                y + 4.0
            );
        }
        for step in self.steps.values() {
            let (x, _) = self.place(step, self.losses.first);
            let text = self.steps.label(step);
            let _ = writeln!(
                svg,
                "<path d=\"M{x:.1} {bottom:.1}v5\" stroke=\"#5c6670\"/>\
                 <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#5c6670\">{text}</text>",
                bottom + 19.0
            );
        }
        let _ = writeln!(
            svg,
            "<path d=\"M{left:.1} {top:.1}V{bottom:.1}H{right:.1}\" fill=\"none\" stroke=\"#5c6670\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#343a40\">optimizer step</text>\n\
             <text transform=\"translate(18 {:.1}) rotate(-90)\" text-anchor=\"middle\" fill=\"#343a40\">\
             loss ({unit})</text>",
            f64::midpoint(left, right),
            HEIGHT - 10.0,
            f64::midpoint(top, bottom)
        );
    }

    fn line(&self, svg: &mut String, points: &[(usize, f64)], style: &str) {
        let place = |&(step, loss): &(usize, f64)| {
            let (x, y) = self.place(step as f64, loss);
            format!("{x:.1},{y:.1}")
        };
        // No screen shows more points than this.
        let stride = points.len().div_ceil(2000).max(1);
        let places: Vec<String> = points.iter().step_by(stride).map(place).collect();
        if places.len() > 1 {
            let points = places.join(" ");
            let _ = writeln!(svg, "<polyline points=\"{points}\" fill=\"none\" {style}/>");
        }
    }
}

impl Ticks {
    /// About `count` ticks, 1, 2 or 5 times a power of ten apart, that enclose `lowest` and
    /// `highest`.
    fn over(lowest: f64, highest: f64, count: f64) -> Self {
        let rough = ((highest - lowest) / count).max(1e-6);
        let power = 10.0_f64.powf(rough.log10().floor());
        let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough);
        let distance = factor.unwrap_or(10.0) * power;
        let first = (lowest / distance).floor() * distance;
        let last = ((highest / distance).ceil() * distance).max(first + distance);
        Self { first, last, distance }
    }

    fn values(&self) -> impl Iterator<Item = f64> {
        let count = ((self.last - self.first) / self.distance).round() as usize;
        (0..=count).map(|index| self.first + self.distance * index as f64)
    }

    /// Where `value` is between the first tick (0) and the last (1).
    fn share(&self, value: f64) -> f64 {
        (value - self.first) / (self.last - self.first)
    }

    /// `value` with as many digits as the distance of the ticks needs.
    fn label(&self, value: f64) -> String {
        let digits = (-self.distance.log10().floor()).max(0.0) as usize;
        format!("{value:.digits$}")
    }
}

/// A mean that follows the points with a memory of about a twentieth of them.
fn running_mean(points: &[(usize, f64)]) -> Vec<(usize, f64)> {
    let weight = 1.0 / (points.len() as f64 / 20.0).max(1.0);
    let mut mean = points.first().map_or(0.0, |&(_, loss)| loss);
    let follow = |&(step, loss): &(usize, f64)| {
        mean += weight * (loss - mean);
        (step, mean)
    };
    points.iter().map(follow).collect()
}

fn legend(svg: &mut String, train: &[(usize, f64)], valid: &[(usize, f64)]) {
    let mut x = BORDER[0];
    for (name, colour, points) in [("train", "#1f6fb4", train), ("valid", "#d9480f", valid)] {
        let (Some((_, first)), Some((_, last))) = (points.first(), points.last()) else { continue };
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"22\" width=\"14\" height=\"4\" rx=\"2\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"28\" fill=\"#343a40\">{name}: {first:.3} → {last:.3}</text>",
            x + 20.0
        );
        x += 190.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: usize, loss: f64) -> TrainEvent {
        TrainEvent::Step {
            step,
            epoch: 0.0,
            loss,
            token_accuracy: 0.0,
            learning_rate: 0.0,
            grad_norm: 0.0,
            num_tokens: 1,
            num_trained_tokens: 1,
            rewards: None,
            seconds: 1.0,
        }
    }

    fn validated(step: usize, loss: f64) -> TrainEvent {
        let (perplexity, token_accuracy) = (loss.exp(), 0.5);
        let num_trained_tokens = 1;
        TrainEvent::Validated {
            step,
            full: true,
            loss,
            perplexity,
            token_accuracy,
            num_trained_tokens,
            rewards: None,
            seconds: 1.0,
        }
    }

    #[test]
    fn a_spike_is_a_loss_that_stays_far_above_its_median_and_is_told_once() {
        let told = |losses: &[f64]| -> Vec<usize> {
            let events: Vec<_> = losses.iter().zip(1..).map(|(loss, n)| step(n, *loss)).collect();
            (1..=events.len()).filter(|n| spike(&events[..*n], 20, 3.0, 3).is_some()).collect()
        };
        let calm = [1.0; 20];
        assert_eq!(told(&[&calm[..], &[3.5, 3.5, 3.5, 3.5, 3.5]].concat()), [23]);
        assert_eq!(told(&[&calm[..], &[3.5, 3.5, 1.0, 3.5]].concat()), [0; 0]);
        assert_eq!(told(&[9.0, 9.0, 9.0]), [0; 0], "too few steps to know");
        // A run may go wrong at once.
        assert_eq!(told(&[&[2.0; 4][..], &[20.0; 30]].concat()), [7]);
        assert_eq!(told(&[&[2.0; 2][..], &[20.0; 30]].concat()), [6]);
        assert_eq!(told(&[&[0.5, 2.0, 2.1][..], &[1.9; 30]].concat()), [0; 0], "one easy row");
    }

    #[test]
    fn a_gradient_of_nothing_beside_a_loss_is_seen_after_some_steps() {
        let with = |loss: f64, norm: f64| {
            let mut event = step(1, loss);
            if let TrainEvent::Step { grad_norm, .. } = &mut event {
                *grad_norm = norm;
            }
            event
        };
        let seen = |pairs: &[(f64, f64)]| {
            no_slope(&pairs.iter().map(|pair| with(pair.0, pair.1)).collect::<Vec<_>>(), 3)
        };
        assert_eq!(seen(&[(2.0, 1.0), (7.0, 0.0), (7.0, 0.0), (7.5, 0.0)]), Some(7.5));
        assert_eq!(seen(&[(7.0, 0.0), (7.0, 1e-30), (7.0, 0.0), (7.0, 0.0)]), None);
        assert_eq!(seen(&[(7.0, 0.0), (7.0, 0.0)]), None, "too few steps to know");
        assert_eq!(seen(&[(0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]), None, "nothing is left to learn");
    }

    /// All coordinates of the polylines.
    fn places(svg: &str) -> Vec<(f64, f64)> {
        let lists = svg.split("points=\"").skip(1).map(|rest| rest.split('"').next().unwrap());
        let pairs = lists.flat_map(str::split_whitespace).map(|pair| pair.split_once(',').unwrap());
        pairs.map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).collect()
    }

    #[test]
    fn every_point_of_a_curve_lies_inside_the_plot() {
        let mut events: Vec<_> = (1..=5000).map(|n| step(n, 9.7 / (n as f64).sqrt())).collect();
        events.insert(2000, validated(2000, 0.31));
        events.push(validated(5000, 0.17));
        let svg = loss_curve_svg(&events);
        let places = places(&svg);
        assert!(places.len() > 2000 && places.len() < 6000, "{} points", places.len());
        for (x, y) in places {
            assert!((64.0..=836.0).contains(&x) && (52.0..=372.0).contains(&y), "{x},{y}");
        }
        assert_eq!(svg.matches("<polyline").count(), 3);
        assert!(svg.contains("valid: 0.310 → 0.170"), "{svg}");
    }

    #[test]
    fn a_run_without_steps_or_with_a_flat_loss_still_has_axes() {
        for events in [vec![], vec![step(1, 2.0)], vec![step(1, 2.0), step(2, 2.0)]] {
            let svg = loss_curve_svg(&events);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(svg.contains("optimizer step") && svg.ends_with("</svg>\n"));
        }
    }

    #[test]
    fn the_cards_curve_has_a_point_a_step_and_validations_at_theirs() {
        let curve = curve(&[step(1, 3.0), step(2, 2.0), validated(2, 2.5), step(3, 1.0)]);
        let points: Vec<_> =
            curve.iter().map(|point| (point.step, point.loss, point.validation_loss)).collect();
        let expected = [(1, Some(3.0), None), (2, Some(2.0), Some(2.5)), (3, Some(1.0), None)];
        assert_eq!(points, expected);
    }
}
