// Generates text with an inline bundle: docs/contract.md as a program. README.md beside it says how to build and run it.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>

#include "engine.h"
#include "model.h"
#include "sequence.h"
#include "session.h"
#include "tokenizer.h"

namespace {

constexpr const char* kUsage =
    "driver BUNDLE [--prompt TEXT | --tokens N,N,...] [-n N] [--session FOLDER [--continue]] [--prune A:B,C:D...]\n"
    "              [--threads N] [--json]";

struct Usage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  std::string bundle, prompt, tokens, session, prune;
  bool given = false, go_on = false, json = false;
  int64_t count = 256;
  int threads = static_cast<int>(std::clamp(std::thread::hardware_concurrency(), 1u, 4u));
};

int64_t whole(const std::string& text) {
  char* end = nullptr;
  int64_t value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 0) throw Usage(text + " is no whole number");
  return value;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (size_t start = 0; start < text.size();) {
    size_t end = std::min(text.find(separator, start), text.size());
    parts.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

Options parse(int n, char** arguments) {
  Options options;
  for (int i = 1; i < n; ++i) {
    std::string name = arguments[i];
    auto value = [&]() -> std::string {
      if (i + 1 == n) throw Usage(name + " needs a value");
      return arguments[++i];
    };
    if (name == "--prompt") options.prompt = value(), options.given = true;
    else if (name == "--tokens") options.tokens = value(), options.given = true;
    else if (name == "-n") options.count = whole(value());
    else if (name == "--session") options.session = value();
    else if (name == "--continue") options.go_on = true;
    else if (name == "--prune") options.prune = value();
    else if (name == "--threads") options.threads = static_cast<int>(whole(value()));
    else if (name == "--json") options.json = true;
    else if (options.bundle.empty() && name[0] != '-') options.bundle = name;
    else throw Usage("unknown: " + name);
  }
  if (options.bundle.empty()) throw Usage("which bundle?");
  if (options.go_on && options.session.empty()) throw Usage("--continue needs --session");
  if (!options.go_on && !options.given) throw Usage("--prompt is missing");
  return options;
}

std::vector<int64_t> prompt_of(const Options& options, const Model& model, const Tokenizer& tokenizer) {
  std::vector<int64_t> tokens;
  for (const std::string& part : split(options.tokens, ',')) tokens.push_back(whole(part));
  if (!tokens.empty()) return tokens;
  tokens = tokenizer.encode(options.prompt);
  if (options.go_on) return tokens;  // text in the middle of a sequence
  if (tokens.empty()) return {model.manifest.at("model").at("bos_token_id").integer()};
  tokens.insert(tokens.begin(), model.prompt_begin.begin(), model.prompt_begin.end());
  tokens.insert(tokens.end(), model.prompt_end.begin(), model.prompt_end.end());
  return tokens;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void run(const Options& options) {
  const Model model(options.bundle);
  const Tokenizer tokenizer(model.tokenizer);
  Engine engine(model.graph, options.threads);
  Sequence sequence(model, engine);
  std::unique_ptr<Session> session;
  if (!options.session.empty()) {
    session = std::make_unique<Session>(options.session, model);
    if (session->holds_something()) session->load(sequence);
    else if (options.go_on) throw std::runtime_error(options.session + " holds nothing to go on with");
  }

  std::vector<int64_t> wanted = prompt_of(options, model, tokenizer);
  if (options.go_on) wanted.insert(wanted.begin(), sequence.tokens.begin(), sequence.tokens.end());
  if (wanted.empty()) throw std::runtime_error("there is no token to begin with");
  for (int64_t token : wanted)
    if (token >= model.vocab_size) throw std::runtime_error("token " + std::to_string(token) + " is not in the vocabulary");
  const double start = now();
  const float* logits = sequence.prefill(wanted);
  const double prefilled = now();
  for (const std::string& range : split(options.prune, ',')) {
    const std::vector<std::string> ends = split(range, ':');
    if (ends.size() != 2 || whole(ends[1]) > sequence.cache.size())
      throw Usage("--prune " + range + " is no range of tokens: START:STOP");
    sequence.cache.prune(whole(ends[0]), whole(ends[1]));
  }

  std::string text;
  std::vector<int64_t> answer;
  const int64_t most = std::min(options.count, model.max_context - static_cast<int64_t>(wanted.size()));
  while (static_cast<int64_t>(answer.size()) < most) {
    if (!answer.empty()) {
      sequence.tokens.pop_back();  // it was noted without keys and values; the step notes it again
      logits = sequence.step({answer.back()});
    }
    const int64_t token = std::max_element(logits, logits + model.vocab_size) - logits;
    if (std::find(model.eos.begin(), model.eos.end(), token) != model.eos.end()) break;
    answer.push_back(token);
    sequence.tokens.push_back(token);
    const std::string piece = tokenizer.decode(token);
    text += piece;
    if (!options.json) {
      std::fwrite(piece.data(), 1, piece.size(), stdout);
      std::fflush(stdout);
    }
  }
  const double decoded = now();
  if (session != nullptr) session->save(sequence);

  if (!options.json) {
    std::printf("\n");
    return;
  }
  auto list = [](const std::vector<int64_t>& numbers) {
    std::string result;
    for (int64_t number : numbers) result += (result.empty() ? "" : ", ") + std::to_string(number);
    return "[" + result + "]";
  };
  std::printf(
      "{\"text\": %s, \"tokens\": %s, \"prompt\": %s, \"reused_tokens\": %lld, \"prefill_seconds\": %.4f, "
      "\"decode_seconds\": %.4f, \"engine\": %s}\n",
      quoted(text).c_str(), list(answer).c_str(), list(wanted).c_str(), static_cast<long long>(sequence.reused),
      prefilled - start, decoded - prefilled, quoted(engine.description()).c_str());
}

}  // namespace

int main(int n, char** arguments) {
  try {
    run(parse(n, arguments));
    return 0;
  } catch (const Usage& error) {
    std::fprintf(stderr, "driver: %s\n%s\n", error.what(), kUsage);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "driver: %s\n", error.what());
    return 1;
  }
}
