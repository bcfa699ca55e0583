// Fuses two KV-caches without Python: reads the arguments of c2c::fuse_ that save_call.py wrote,
// calls the op, writes the receiver's fused cache.     usage: fuse call.pt fused.pt
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

// Lists come untyped out of a file; the op takes Tensor[] and int[].
c10::IValue as_type(const c10::IValue& value, const c10::TypePtr& type) {
  if (!value.isList()) return value;
  if (type->expectRef<c10::ListType>().getElementType()->kind() == c10::TypeKind::IntType) {
    c10::List<int64_t> numbers;
    for (const c10::IValue& item : value.toListRef()) numbers.push_back(item.toInt());
    return numbers;
  }
  c10::List<at::Tensor> tensors;
  for (const c10::IValue& item : value.toListRef()) tensors.push_back(item.toTensor());
  return tensors;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: fuse call.pt fused.pt\n";
    return 2;
  }
  try {
    std::ifstream file(argv[1], std::ios::binary);
    if (!file) throw std::runtime_error(std::string("cannot read ") + argv[1]);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    const auto call = torch::jit::pickle_load(bytes).toGenericDict();  // argument name -> value

    const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("c2c::fuse_", "");
    std::vector<c10::IValue> stack;
    for (const c10::Argument& argument : op.schema().arguments()) {
      stack.push_back(as_type(call.at(argument.name()), argument.type()));
    }
    const at::NoGradGuard no_grad;
    op.callBoxed(stack);  // writes out_keys and out_values

    std::vector<c10::IValue> fused;  // every layer's key, then every layer's value
    for (const char* name : {"out_keys", "out_values"}) {
      for (const c10::IValue& tensor : call.at(name).toListRef()) fused.push_back(tensor);
    }
    const std::vector<char> written =
        torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(fused)));
    std::ofstream output(argv[2], std::ios::binary);
    if (!output.write(written.data(), written.size()).flush()) {
      throw std::runtime_error(std::string("cannot write ") + argv[2]);
    }
  } catch (const c10::Error& error) {
    std::cerr << "fuse: " << error.what_without_backtrace() << "\n";
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "fuse: " << error.what() << "\n";
    return 1;
  }
}
