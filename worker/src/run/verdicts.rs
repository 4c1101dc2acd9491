//! Looks now and then at what became of this machine's submissions, and says what is new.

use cairn_proto::client::ClientError;
use cairn_proto::v1;

use super::context::Ctx;
use crate::limits::VERDICTS_EVERY;
use crate::receipts::{self, Outcome};

/// Runs until aborted. Evaluators submit nothing; for them it does nothing.
pub async fn watch(context: Ctx) {
    if context.client.identity().role != v1::Role::Volunteer {
        return std::future::pending().await;
    }
    loop {
        // An absent coordinator is reported by the stages; verdicts can wait.
        let _ = look(&context).await;
        tokio::time::sleep(VERDICTS_EVERY).await;
    }
}

async fn look(context: &Ctx) -> Result<(), ClientError> {
    let request = v1::ListSubmissionsRequest::default();
    let page = context
        .client
        .call_once(|mut to| {
            let request = request.clone();
            async move { to.volunteer.list_submissions(request).await }
        })
        .await?;
    for submission in page.submissions.iter().rev() {
        let Some(contribution) = &submission.contribution else {
            continue;
        };
        let Some(mut stored) = receipts::read(&context.receipts, &contribution.id) else {
            continue;
        };
        let now = Outcome::of(contribution);
        if let Some(line) = news(stored.verdict.as_ref(), &now) {
            eprintln!(
                "shard {} of round {}: {line}",
                contribution.shard, submission.round_id
            );
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
    Ok(())
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
