//! From tokens of many heads to heads of many tokens and back, rotating positions on the way
//! (rotary embedding, arXiv 2104.09864): one pass over memory for both.

use rayon::prelude::*;

use crate::lanes::{rows_a_piece, vectorised};

/// Cosine and sine of every token's angles, `[L or N, E]` each: a row for every place in a row of
/// tokens, or for every token of the batch. The first half of a sine row is negative, so that
/// `x cos + swap(x) sin` is the rotation, `swap` exchanging the halves.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// Cosines, twice.
    pub cos: &'a [f32],
    /// Sines, once negative and once not.
    pub sin: &'a [f32],
}

/// How tokens are laid out.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Tokens a row of the batch.
    pub length: usize,
    /// Heads.
    pub heads: usize,
    /// Width of a head.
    pub width: usize,
}

/// Heads side by side, `[N, heads E]`, become heads one after the other, `[R, heads, L, E]`.
pub fn split(flat: &[f32], layout: Layout, rotation: Option<Rotation<'_>>, out: &mut [f32]) {
    let Layout {
        length,
        heads,
        width,
    } = layout;
    assert_eq!(flat.len(), out.len());
    out.par_chunks_mut(length * width)
        .with_min_len(rows_a_piece(length * width))
        .enumerate()
        .for_each(|(place, out)| {
            let (row, head) = (place / heads, place % heads);
            vectorised(
                #[inline(always)]
                || {
                    for (t, out) in out.chunks_exact_mut(width).enumerate() {
                        let token = row * length + t;
                        let from = &flat[(token * heads + head) * width..][..width];
                        match rotation {
                            None => out.copy_from_slice(from),
                            Some(rotation) => {
                                let (cos, sin) = rotation.at(token, width);
                                rotate(from, cos, sin, out);
                            }
                        }
                    }
                },
            );
        });
}

/// The way back: `[R, heads, L, E]` becomes `[N, heads E]`, rotated backwards. It is the gradient of
/// [`split`] too, whatever scale the rotation has.
pub fn merge(split: &[f32], layout: Layout, rotation: Option<Rotation<'_>>, out: &mut [f32]) {
    let Layout {
        length,
        heads,
        width,
    } = layout;
    assert_eq!(split.len(), out.len());
    let token_width = heads * width;
    let tokens = rows_a_piece(token_width);
    out.par_chunks_mut(tokens * token_width)
        .enumerate()
        .for_each(|(piece, out)| {
            vectorised(
                #[inline(always)]
                || {
                    for (t, out) in out.chunks_exact_mut(token_width).enumerate() {
                        let token = piece * tokens + t;
                        let (row, t) = (token / length, token % length);
                        for (head, out) in out.chunks_exact_mut(width).enumerate() {
                            let from =
                                &split[((row * heads + head) * length + t) * width..][..width];
                            match rotation {
                                None => out.copy_from_slice(from),
                                Some(rotation) => {
                                    // The transposed rotation: the sines of the other half.
                                    let (cos, sin) = rotation.at(token, width);
                                    let (low, high) = sin.split_at(width / 2);
                                    rotate_halves(from, cos, (high, low), out);
                                }
                            }
                        }
                    }
                },
            );
        });
}

impl<'a> Rotation<'a> {
    #[inline(always)]
    fn at(self, token: usize, width: usize) -> (&'a [f32], &'a [f32]) {
        let start = token * width % self.cos.len();
        (&self.cos[start..][..width], &self.sin[start..][..width])
    }
}

#[inline(always)]
fn rotate(from: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
    rotate_halves(from, cos, sin.split_at(from.len() / 2), out);
}

#[inline(always)]
fn rotate_halves(from: &[f32], cos: &[f32], sin: (&[f32], &[f32]), out: &mut [f32]) {
    let half = from.len() / 2;
    let ((a, b), (low, high)) = (from.split_at(half), out.split_at_mut(half));
    for ((((low, a), b), cos), sin) in low.iter_mut().zip(a).zip(b).zip(cos).zip(sin.0) {
        *low = a * cos + b * sin;
    }
    for ((((high, a), b), cos), sin) in high.iter_mut().zip(a).zip(b).zip(&cos[half..]).zip(sin.1) {
        *high = b * cos + a * sin;
    }
}
