//! Several adapters as one, exactly: factors are put side by side along the rank.
//!
//! `sum_i w_i s_i B_i A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 | ...] [A_1; A_2; ...]`. With weights and
//! scales inside B, alpha equals rank and the scale is 1.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::adapter::{
    AdapterError, AdapterFile, AdapterWriteConfig, Pair, PairShape, write_adapter_streamed,
};
use crate::peft::TargetModules;

/// One pair whose delta is the weighted sum of the given pairs' deltas, with scale 1. The pairs
/// must be of one module; `w * s * B` is computed in f64 and rounded once to f32.
///
/// # Errors
/// When there is no pair, shapes differ, or a weight is not finite.
pub fn concat_pairs(terms: &[(&Pair, f64)]) -> Result<Pair, AdapterError> {
    let Some(((first, _), _)) = terms.split_first() else {
        return Err(AdapterError::Empty);
    };
    let shape = |pair: &Pair| format!("[{}, {}]", pair.out_features, pair.in_features);
    for (pair, weight) in terms {
        if (pair.in_features, pair.out_features) != (first.in_features, first.out_features) {
            let module = first.module.clone();
            return Err(AdapterError::Mismatch {
                module,
                first: shape(first),
                second: shape(pair),
            });
        }
        if !weight.is_finite() {
            return Err(AdapterError::Weight(*weight));
        }
    }
    let rank = terms.iter().map(|(pair, _)| pair.rank).sum();
    let a = terms
        .iter()
        .flat_map(|(pair, _)| pair.a.iter().copied())
        .collect();
    let mut b = Vec::with_capacity(first.out_features.saturating_mul(rank));
    for row in 0..first.out_features {
        for (pair, weight) in terms {
            let factor = weight * pair.scale;
            let values = pair.b.iter().skip(row * pair.rank).take(pair.rank);
            #[expect(
                clippy::cast_possible_truncation,
                reason = "rounding to f32 is the point"
            )]
            b.extend(values.map(|value| (factor * f64::from(*value)) as f32));
        }
    }
    let (in_features, out_features) = (first.in_features, first.out_features);
    Ok(Pair {
        module: first.module.clone(),
        rank,
        in_features,
        out_features,
        a,
        b,
        scale: 1.0,
    })
}

/// Writes the weighted sum of adapters as one adapter into `dir`, module by module. Terms of
/// weight 0 are left out. Ranks add up; a module that not all adapters have becomes a rank pattern.
///
/// # Errors
/// When nothing is left to combine, shapes differ, a weight is not finite, or files fail.
pub fn concat(
    terms: &[(&AdapterFile, f64)],
    dir: &Path,
    base_model: Option<&str>,
    revision: Option<&str>,
) -> Result<(), AdapterError> {
    if let Some((_, weight)) = terms.iter().find(|(_, weight)| !weight.is_finite()) {
        return Err(AdapterError::Weight(*weight));
    }
    let terms: Vec<(&AdapterFile, f64)> = terms
        .iter()
        .copied()
        .filter(|(_, weight)| *weight != 0.0)
        .collect();
    let shapes = union(&terms);
    let rank = shapes
        .iter()
        .map(|shape| shape.rank)
        .max()
        .ok_or(AdapterError::Empty)?;
    #[expect(clippy::cast_precision_loss, reason = "ranks are far below 2^53")]
    let alpha = rank as f64;
    let config = AdapterWriteConfig {
        rank,
        alpha,
        use_rslora: false,
        target_modules: target_names(&terms, &shapes),
        base_model: base_model.map(str::to_owned),
        revision: revision.map(str::to_owned),
    };
    write_adapter_streamed(dir, &shapes, &config, |index| {
        let mut pairs = Vec::new();
        for (adapter, weight) in &terms {
            if let Some(place) = shapes
                .get(index)
                .and_then(|shape| adapter.find(&shape.module))
            {
                pairs.push((adapter.pair(place)?, *weight));
            }
        }
        let pairs: Vec<(&Pair, f64)> = pairs.iter().map(|(pair, weight)| (pair, *weight)).collect();
        concat_pairs(&pairs)
    })
}

/// Every module of any adapter once, with the sum of its ranks.
pub(crate) fn union(terms: &[(&AdapterFile, f64)]) -> Vec<PairShape> {
    let mut shapes: BTreeMap<&str, PairShape> = BTreeMap::new();
    for info in terms.iter().flat_map(|(adapter, _)| adapter.modules()) {
        let shape = shapes.entry(&info.module).or_insert_with(|| PairShape {
            module: info.module.clone(),
            rank: 0,
            in_features: info.in_features,
            out_features: info.out_features,
            scale: 1.0,
        });
        shape.rank += info.rank;
    }
    shapes.into_values().collect()
}

/// Short names where every adapter named its targets so and took all layers; otherwise whole paths,
/// for a short name would make PEFT adapt layers that no adapter has.
pub(crate) fn target_names(terms: &[(&AdapterFile, f64)], shapes: &[PairShape]) -> Vec<String> {
    let mut names = BTreeSet::new();
    for (adapter, _) in terms {
        match &adapter.config().target_modules {
            TargetModules::List(list) if !adapter.config().some_layers => {
                names.extend(list.iter().cloned());
            }
            _ => return shapes.iter().map(|shape| shape.module.clone()).collect(),
        }
    }
    names.into_iter().collect()
}

#[cfg(test)]
#[path = "compress_tests.rs"]
mod tests;
