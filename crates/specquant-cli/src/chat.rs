//! `specquant chat`: lines of stdin are the user's messages.

use std::io::{BufRead, IsTerminal, Write, stderr, stdin, stdout};
use std::process::ExitCode;

use specquant_model::{Message, Model, Sampler, generate};

use crate::args::ChatArgs;
use crate::generate::sampling;
use crate::system;
use crate::ui::note;

pub fn run(args: ChatArgs) -> anyhow::Result<ExitCode> {
    system::set_threads(args.model.threads)?;
    let mut sampler = Sampler::new(sampling(&args.sampling)?);
    let source = args.model.open()?;
    let tokenizer = source.tokenizer()?;
    let mut model = Model::load_for_decoding(&source)?;
    model.set_any_order(true);
    let mut messages: Vec<Message> = args.system.iter().map(|text| message("system", text)).collect();
    // Fails now, not after the first message, if there is no template.
    tokenizer.chat_prompt(&[message("user", "hello")], true)?;
    let interactive = stdin().is_terminal();
    if interactive {
        note!("Chatting with {}. An empty line or Ctrl-D ends.", args.model.model.display());
    }
    let mut sequence = model.sequence();
    let mut seen: Vec<u32> = Vec::new();
    let mut lines = stdin().lock().lines();
    loop {
        if interactive {
            let _ = write!(stderr(), "> ");
        }
        let Some(line) = lines.next().transpose()? else { break };
        if line.trim().is_empty() {
            break;
        }
        messages.push(message("user", &line));
        let prompt = tokenizer.encode(&tokenizer.chat_prompt(&messages, true)?, false)?;
        anyhow::ensure!(
            !prompt.is_empty(),
            "the chat template of {} renders nothing",
            args.model.model.display()
        );
        // What the cache holds of this prompt already need not be computed again; one token is always left to feed.
        let common = prompt.iter().zip(&seen).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        sequence.truncate(common);
        seen.clone_from(&prompt);
        let (mut out, mut decode) = (stdout(), tokenizer.decoder(true));
        let (mut answer, mut failure) = (String::new(), None);
        generate(
            &model,
            &mut sequence,
            &prompt[common..],
            args.sampling.max_new_tokens,
            &mut sampler,
            |id| {
                if model.config.eos_token_ids.contains(&id) {
                    return false;
                }
                let shown = decode(id).map_err(anyhow::Error::from).and_then(|news| {
                    let news = news.unwrap_or_default();
                    write!(out, "{news}")?;
                    out.flush()?;
                    answer.push_str(&news);
                    Ok(())
                });
                seen.push(id);
                failure = shown.err();
                failure.is_none()
            },
        )?;
        if let Some(e) = failure {
            return Err(e);
        }
        writeln!(out)?;
        // The last token was printed but never fed.
        seen.truncate(sequence.len());
        messages.push(message("assistant", &answer));
    }
    Ok(ExitCode::SUCCESS)
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}
