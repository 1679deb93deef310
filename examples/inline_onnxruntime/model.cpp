#include "model.h"

#include <algorithm>
#include <stdexcept>

#include "engine.h"
#include "hashes.h"

namespace {

std::string short_hash(const std::vector<double>& numbers) {
  std::string bytes(reinterpret_cast<const char*>(numbers.data()), 8 * numbers.size());
  return hexadecimal(sha256(bytes)).substr(0, 16);
}

std::string file_of(const std::string& bundle, const std::string& name, const Json& manifest) {
  if (manifest.at("files").get(name).is_null()) throw std::runtime_error(bundle + ": the manifest lists no file " + name);
  return bundle + "/" + name;
}

}  // namespace

Model::Model(const std::string& bundle) : manifest(Json::read(bundle + "/manifest.json")) {
  if (manifest.at("format_version").integer() != 2 || manifest.at("contract_version").integer() != 2)
    throw std::runtime_error(bundle + ": this program knows version 2 of manifest and contract");
  if (manifest.at("engine").string() != Engine::kName || manifest.at("form").string() != "inline")
    throw std::runtime_error(bundle + " is no bundle for this program: edgekv export --form inline --engine " + Engine::kName);
  if (const Json& io = manifest.get("io"); !io.is_null() && io.string() != "compact")
    throw std::runtime_error(bundle + ": this program hands over float16: edgekv export --io compact");
  const Json& model = manifest.at("model");
  auto size = [](const Json& table, const char* name) { return static_cast<size_t>(table.at(name).integer()); };
  shape = {size(model, "n_layers"), size(model, "n_kv_heads"), size(model, "head_dim"), size(manifest, "page_size")};
  windows = model.at("windows").integers();
  vocab_size = model.at("vocab_size").integer();
  max_context = model.at("max_context").integer();
  eos = model.get("eos_token_ids").integers();
  prompt_begin = manifest.get("prompt_begin").integers();
  prompt_end = manifest.get("prompt_end").integers();
  graph = file_of(bundle, manifest.at("graphs").items.at(0).string(), manifest);
  const Json& named = manifest.get("tokenizer");
  std::string path = file_of(bundle, named.is_null() ? "tokenizer.json" : named.string(), manifest);
  std::string text = read_file(path);
  if (hexadecimal(sha256(text)) != manifest.at("tokenizer_sha256").string()) throw std::runtime_error(path + " is damaged");
  tokenizer = Json::parse(text);
}

std::string Model::compatibility_key() const {
  const Json& model = manifest.at("model");
  std::vector<double> angles, attention;
  for (const char* name : {"rope", "sliding_rope"}) {
    const Json& rope = model.get(name);
    if (rope.is_null()) continue;
    for (const Json& x : rope.at("inv_freq").items) angles.push_back(x.number());
    angles.push_back(rope.get("attention_scaling").is_null() ? 1.0 : rope.at("attention_scaling").number());
  }
  for (int64_t window : windows) attention.push_back(static_cast<double>(window));
  attention.push_back(model.at("softmax_scale").number());
  const Json& softcap = model.get("softcap");
  if (!softcap.is_null() && softcap.number() > 0) attention.push_back(softcap.number());
  std::string geometry = model.at("n_layers").text + " layers, " + model.at("n_q_heads").text + "/" +
                         model.at("n_kv_heads").text + " heads of " + model.at("head_dim").text;
  return "{\"checkpoint\": " + quoted(manifest.at("source_sha256").string()) +
         ", \"weights\": " + quoted(manifest.at("weights").string()) +
         ", \"tokenizer\": " + quoted(manifest.at("tokenizer_sha256").string()) + ", \"geometry\": " + quoted(geometry) +
         ", \"rope\": " + quoted(short_hash(angles)) + ", \"attention\": " + quoted(short_hash(attention)) +
         ", \"page_size\": " + std::to_string(shape.page_size) + ", \"codec\": 1}";
}
