//! Looks now and then at what became of this machine's submissions: says what is new, opens what is
//! audited, and hands in again what the coordinator has lost.

use std::collections::HashMap;

use cairn_proto::client::ClientError;
use cairn_proto::limits::PAGE_SIZE_MAX;
use cairn_proto::v1;

use super::context::{Context, Ctx};
use super::kept::Kept;
use super::{audits, restore};
use crate::limits::{LIST_PAGES_MAX, VERDICTS_EVERY};
use crate::receipts::{self, Outcome};

/// Runs until aborted. Evaluators submit nothing; for them it does nothing.
pub async fn watch(context: Ctx) {
    if context.client.identity().role != v1::Role::Volunteer {
        return std::future::pending().await;
    }
    loop {
        // An absent coordinator is reported by the stages; verdicts can wait.
        let _ = look(&context).await;
        tokio::select! {
            () = tokio::time::sleep(VERDICTS_EVERY) => (),
            () = context.state.look.notified() => (),
        }
    }
}

async fn look(context: &Ctx) -> Result<(), ClientError> {
    // Before the list is asked for: what is handed in meanwhile is not missed in it.
    let worker_id = &context.client.identity().worker_id;
    let kept = Kept::all(&context.submitted, worker_id);
    let page = list(context, 0, String::new()).await?;
    for submission in page.submissions.iter().rev() {
        note(context, submission);
    }
    if kept.is_empty() {
        return Ok(());
    }
    let listed = Listed::complete(context, page, &kept).await?;
    for mut kept in kept {
        match listed.submissions.get(&kept.id) {
            Some(submission) => settle(context, &mut kept, submission).await,
            None if listed.all && kept.info.refused.is_none() => {
                restore::restore(context, &mut kept).await;
            }
            None => (),
        }
    }
    Ok(())
}

async fn list(
    context: &Context,
    page_size: u32,
    page_token: String,
) -> Result<v1::ListSubmissionsResponse, ClientError> {
    let request = v1::ListSubmissionsRequest {
        page_size: i32::try_from(page_size).unwrap_or_default(),
        page_token,
    };
    context
        .client
        .call_once(|mut to| {
            let request = request.clone();
            async move { to.volunteer.list_submissions(request).await }
        })
        .await
}

/// What the coordinator lists, by id.
struct Listed {
    submissions: HashMap<String, v1::OwnSubmission>,
    /// Whether that is all it has.
    all: bool,
}

impl Listed {
    /// Goes on from the first page until all that is kept has been seen, or the list ends.
    async fn complete(
        context: &Context,
        page: v1::ListSubmissionsResponse,
        kept: &[Kept],
    ) -> Result<Self, ClientError> {
        let mut listed = Self {
            submissions: HashMap::new(),
            all: false,
        };
        let mut token = listed.take(page);
        for _ in 0..LIST_PAGES_MAX {
            let seen = |kept: &Kept| listed.submissions.contains_key(&kept.id);
            if listed.all || kept.iter().all(seen) {
                break;
            }
            token = listed.take(list(context, PAGE_SIZE_MAX, token).await?);
        }
        Ok(listed)
    }

    fn take(&mut self, page: v1::ListSubmissionsResponse) -> String {
        for submission in page.submissions {
            if let Some(contribution) = &submission.contribution {
                self.submissions.insert(contribution.id.clone(), submission);
            }
        }
        self.all = page.next_page_token.is_empty();
        page.next_page_token
    }
}

/// Opens what is audited of a kept submission, and lets go of what is needed no more.
async fn settle(context: &Ctx, kept: &mut Kept, submission: &v1::OwnSubmission) {
    if let Some(asked) = &submission.audit {
        audits::open(context, kept, asked).await;
        return;
    }
    let judged = submission.contribution.as_ref();
    if judged.is_some_and(|judged| judged.verdict() != v1::Verdict::Pending) {
        kept.judged();
    }
    let stored = receipts::read(&context.receipts, &kept.id);
    if stored.is_some_and(|stored| stored.sealed.is_some()) {
        kept.settled();
    }
}

/// Says what is new of a submission, and keeps its newest receipt.
fn note(context: &Context, submission: &v1::OwnSubmission) {
    let Some(contribution) = &submission.contribution else {
        return;
    };
    let Some(mut stored) = receipts::read(&context.receipts, &contribution.id) else {
        return;
    };
    let now = Outcome::of(contribution);
    if let Some(line) = news(stored.verdict.as_ref(), &now) {
        let (shard, round) = (contribution.shard, &submission.round_id);
        eprintln!("shard {shard} of round {round}: {line}");
    }
    let key = &context.client.identity().server_key;
    let sealed = match &submission.receipt {
        Some(receipt) => receipts::sealed(&stored, receipt, key).unwrap_or_else(|error| {
            eprintln!("submission {}: {error}", contribution.id);
            None
        }),
        None => None,
    };
    let sealed = sealed.or_else(|| stored.sealed.clone());
    if stored.verdict.as_ref() != Some(&now) || stored.sealed != sealed {
        (stored.verdict, stored.sealed) = (Some(now), sealed);
        if let Err(error) = receipts::write(&context.receipts, &contribution.id, &stored) {
            eprintln!("{error}");
        }
    }
}

/// What to say when a submission went from `before` to `now`.
fn news(before: Option<&Outcome>, now: &Outcome) -> Option<String> {
    let changed = before.is_none_or(|before| before.verdict != now.verdict);
    let weighed = before.is_none_or(|before| before.weight == 0.0) && now.weight != 0.0;
    match now.verdict.as_str() {
        "rejected" if changed => Some(format!("rejected: {}", reason(now))),
        "accepted" if weighed => Some(format!(
            "stacked into the published checkpoint with weight {:.3}",
            now.weight
        )),
        "accepted" if changed => Some("accepted: it improves the model on the gate set".to_owned()),
        _ => None,
    }
}

/// `NORM_OUTLIER (the adapter's change is far larger than the others')`.
pub fn reason(outcome: &Outcome) -> String {
    let known = outcome
        .reason
        .parse::<cairn_proto::reason::VerdictReason>()
        .ok();
    let sentence = match (outcome.detail.as_str(), known) {
        ("", Some(reason)) => reason.sentence(),
        (detail, _) => detail,
    };
    if sentence.is_empty() {
        outcome.reason.clone()
    } else {
        format!("{} ({sentence})", outcome.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(verdict: &str, weight: f64) -> Outcome {
        Outcome {
            verdict: verdict.to_owned(),
            reason: if verdict == "rejected" {
                "NO_GAIN".to_owned()
            } else {
                String::new()
            },
            detail: String::new(),
            weight,
        }
    }

    #[test]
    fn each_change_is_said_once() {
        let (pending, accepted) = (outcome("pending", 0.0), outcome("accepted", 0.0));
        let (stacked, rejected) = (outcome("accepted", 0.5), outcome("rejected", 0.0));
        assert_eq!(news(None, &pending), None);
        assert!(
            news(Some(&pending), &accepted)
                .unwrap()
                .starts_with("accepted")
        );
        assert_eq!(news(Some(&accepted), &accepted), None);
        assert!(
            news(Some(&accepted), &stacked)
                .unwrap()
                .contains("weight 0.500")
        );
        assert_eq!(news(Some(&stacked), &stacked), None);
        let line = news(Some(&pending), &rejected).unwrap();
        assert!(
            line.starts_with("rejected: NO_GAIN (the adapter does not improve"),
            "{line}"
        );
    }
}
