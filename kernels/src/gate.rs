//! `SwiGLU` (arXiv 2002.05202).

use rayon::prelude::*;

use crate::lanes::{PIECE, sigmoid, vectorised};

/// `out = silu(gate) · up`; all of one length.
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len());
    let pieces = gate.par_chunks(PIECE).zip(up.par_chunks(PIECE));
    pieces
        .zip(out.par_chunks_mut(PIECE))
        .for_each(|((gate, up), out)| {
            vectorised(
                #[inline(always)]
                || {
                    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                        *out = gate * sigmoid(*gate) * up;
                    }
                },
            );
        });
}

/// From the gradient by the output, the gradients by gate and up, each written over its own; and
/// the output once more, written over the gradient: it need not be kept from the way there.
pub fn swiglu_backward(gradient: &mut [f32], gate: &mut [f32], up: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == gradient.len());
    let pieces = gate.par_chunks_mut(PIECE).zip(up.par_chunks_mut(PIECE));
    pieces
        .zip(gradient.par_chunks_mut(PIECE))
        .for_each(|((gate, up), gradient)| {
            vectorised(
                #[inline(always)]
                || {
                    for ((gate, up), gradient) in gate.iter_mut().zip(up).zip(gradient) {
                        let (g, u, d) = (*gate, *up, *gradient);
                        let s = sigmoid(g);
                        let silu = g * s;
                        *gate = d * u * (s + silu * (1.0 - s));
                        *up = d * silu;
                        *gradient = silu * u;
                    }
                },
            );
        });
}
