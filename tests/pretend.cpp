// A device whose memory is the CPU's, and whose tensors are not: who mixes the two gets the errors that a GPU gives.
//
// A tensor of the device has a storage of its own kind, which holds a storage of the CPU. An operation runs on tensors of the CPU that look at
// the same memory; what comes out is wrapped again, so views, `out=` and sizes set anew need no code of their own. Recurrent layers go the way of
// cuDNN: one operation for all layers, weights in one chunk of memory, no gradient but in training.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>
#include <unordered_map>
#include <unordered_set>

using at::IValue;
using at::Storage;
using at::Tensor;
using std::optional;
using std::string;
using Stack = torch::jit::Stack;

namespace {
constexpr auto KIND = c10::DeviceType::PrivateUse1;
const c10::Device HERE(KIND, 0);
const c10::DispatchKeySet ON_CPU(c10::DispatchKey::CPU), ON_IT(c10::DispatchKey::PrivateUse1);

// --- memory

struct Held { Storage cpu; c10::DataPtr lent; };
void let_go(void* held) { delete static_cast<Held*>(held); }
c10::DataPtr hold(const Storage& cpu) { return {cpu.mutable_data(), new Held{cpu, {}}, &let_go, HERE}; }

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t n) override {
        auto cpu = c10::GetAllocator(c10::DeviceType::CPU);
        return hold(Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), n, cpu->allocate(n), cpu, true)));
    }
    void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Memory memory;
REGISTER_ALLOCATOR(KIND, &memory)

bool here(const Tensor& t) { return t.defined() && t.device().type() == KIND; }

Storage held_by(const Storage& s) {
    auto impl = s.unsafeGetStorageImpl();
    bool ours = s.data_ptr().get_deleter() == &let_go;
    if (!ours && !impl->data()) impl->set_data_ptr_noswap(memory.allocate(s.nbytes()));
    else if (!ours) { // memory that somebody else has made
        auto data = impl->mutable_data();
        auto cpu = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), s.nbytes(), c10::DataPtr(data, c10::Device(c10::DeviceType::CPU)), nullptr, false);
        auto held = new Held{Storage(cpu), {}};
        held->lent = impl->set_data_ptr(c10::DataPtr(data, held, &let_go, HERE));
    }
    return static_cast<Held*>(s.data_ptr().get_context())->cpu;
}

// --- numbers drawn at random: a generator of the device hides one of the CPU

struct Numbers final : c10::GeneratorImpl {
    at::Generator cpu;
    explicit Numbers(at::Generator g) : GeneratorImpl(HERE, ON_IT), cpu(std::move(g)) {}
    void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
    void set_offset(uint64_t) override {} // its state is all there is
    uint64_t get_offset() const override { return 0; }
    uint64_t current_seed() const override { return cpu.current_seed(); }
    uint64_t seed() override { return cpu.seed(); }
    void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
    Numbers* clone_impl() const override { return new Numbers(cpu.clone()); }
};
at::Generator made() { return at::make_generator<Numbers>(at::detail::createCPUGenerator()); }
const at::Generator& numbers() { static at::Generator all = made(); return all; }
at::Generator hidden(const at::Generator& g) { return static_cast<Numbers*>(g.unsafeGetGeneratorImpl())->cpu; }

// While this lives, whoever draws from the CPU's own generator draws from the device's
struct Drawing {
    bool on;
    at::Generator theirs = at::detail::getDefaultCPUGenerator(), ours = hidden(numbers());
    Tensor state;
    explicit Drawing(bool on_) : on(on_) { if (on) { state = theirs.get_state(); theirs.set_state(ours.get_state()); } }
    ~Drawing() { if (on) { ours.set_state(theirs.get_state()); theirs.set_state(state); } }
};

// --- tensors there and back

c10::DispatchKeySet with_zero(const Tensor& t, c10::DispatchKeySet keys) { return t._is_zerotensor() ? keys.add(c10::DispatchKey::ZeroTensor) : keys; }

struct Crossing {
    std::vector<std::pair<Tensor, Tensor>> tensors; // of the device, of the CPU
    std::unordered_map<const c10::StorageImpl*, Storage> storages; // what holds a storage of the CPU

    Storage cpu(const Storage& s) {
        auto o = held_by(s);
        storages.emplace(o.unsafeGetStorageImpl(), s);
        return o;
    }
    Tensor cpu(const Tensor& t) {
        if (!here(t)) return t;
        TORCH_CHECK_NOT_IMPLEMENTED(t.layout() == at::kStrided && !t.is_quantized(), "the pretend device has plain tensors alone");
        auto o = at::detail::make_tensor<c10::TensorImpl>(cpu(t.storage()), with_zero(t, ON_CPU), t.dtype());
        o.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
        if (t.unsafeGetTensorImpl()->is_wrapped_number()) o.unsafeGetTensorImpl()->set_wrapped_number(true);
        if (t.is_conj()) o._set_conj(true);
        if (t.is_neg()) o._set_neg(true);
        tensors.emplace_back(t, o);
        return o;
    }
    Storage back(const Storage& o) {
        auto& s = storages[o.unsafeGetStorageImpl()];
        if (!s) s = Storage(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), o.nbytes(), hold(o), &memory, true));
        return s;
    }
    Tensor back(const Tensor& o) {
        if (!o.defined()) return o;
        for (auto& p : tensors) if (p.second.is_same(o)) return p.first;
        if (here(o)) return o;
        TORCH_CHECK_NOT_IMPLEMENTED(o.layout() == at::kStrided && !o.is_quantized() && o.has_storage(), "the pretend device has plain tensors alone");
        auto t = at::detail::make_tensor<c10::TensorImpl>(back(o.storage()), with_zero(o, ON_IT), o.dtype());
        t.unsafeGetTensorImpl()->set_sizes_and_strides(o.sizes(), o.strides(), o.storage_offset());
        if (o.is_conj()) t._set_conj(true);
        if (o.is_neg()) t._set_neg(true);
        tensors.emplace_back(t, o);
        return t;
    }
    // What an operation has resized, or set elsewhere, is so on both sides
    void settle() {
        for (auto& [cpu, s] : storages) {
            auto o = held_by(s);
            if (s.data() == o.data() && s.nbytes() == o.nbytes()) continue;
            s.unsafeGetStorageImpl()->set_data_ptr_noswap(hold(o));
            s.unsafeGetStorageImpl()->set_nbytes(o.nbytes());
        }
        for (size_t i = 0; i < tensors.size(); i++) {
            auto [t, o] = tensors[i];
            auto impl = t.unsafeGetTensorImpl();
            if (!held_by(t.storage()).is_alias_of(o.storage())) impl->set_storage_keep_dtype(back(o.storage()));
            if (t.sizes() != o.sizes() || t.strides() != o.strides() || t.storage_offset() != o.storage_offset())
                impl->set_sizes_and_strides(o.sizes(), o.strides(), o.storage_offset());
        }
    }
};

// --- who may be where: operations that check nothing on a GPU let iterators do it, which take numbers (0 dimensions) from the CPU

std::unordered_set<string>& unchecked() { static std::unordered_set<string> names; return names; }
string spelled(const c10::OperatorName& o) { return o.overload_name.empty() ? o.name : o.name + "." + o.overload_name; }

void each_tensor(const IValue& v, const std::function<void(const Tensor&)>& f) {
    if (v.isTensor()) f(v.toTensor());
    else if (v.isTensorList()) for (const Tensor& t : v.toTensorList()) f(t);
    else if (v.isList()) for (const IValue& o : v.toListRef()) if (o.isTensor()) f(o.toTensor());
}

void check(const c10::OperatorHandle& op, const Stack& stack, size_t first) {
    auto& schema = op.schema();
    auto name = spelled(op.operator_name());
    bool lenient = unchecked().count(name), indexed = name.find("aten::index") == 0 || name.find("aten::_index_put_impl_") == 0 || name.find("aten::_unsafe_index") == 0;
    bool ours = false, drawn = false;
    for (size_t i = first; i < stack.size(); i++) {
        each_tensor(stack[i], [&](const Tensor& t) { ours |= here(t); });
        if (stack[i].isDevice()) ours |= stack[i].toDevice().type() == KIND;
        drawn |= stack[i].isGenerator();
    }
    TORCH_CHECK(ours || !drawn, "Expected a 'cpu' device type for generator but found '", HERE.type(), "'");
    if (!ours) return;
    for (size_t i = first; i < stack.size(); i++) {
        auto& arg = schema.arguments()[i - first];
        bool written = arg.alias_info() && arg.alias_info()->isWrite();
        each_tensor(stack[i], [&](const Tensor& t) {
            if (!t.defined() || here(t)) return;
            bool number = t.dim() == 0 && t.device().is_cpu() && !written;
            if ((lenient && number) || (indexed && arg.name() == "indices")) return;
            TORCH_CHECK(false, "Expected all tensors to be on the same device, but got ", arg.name(), " is on ", t.device(), ", different from other tensors on ",
                HERE, " (when checking argument in method ", name, ")");
        });
        if (stack[i].isGenerator())
            TORCH_CHECK(stack[i].toGenerator().device().type() == KIND, "Expected a '", HERE.type(), "' device type for generator but found '", stack[i].toGenerator().device().type(), "'");
    }
}

// --- any operation

IValue crossed(Crossing& c, const IValue& v, bool back) {
    auto f = [&](const Tensor& t) { return back ? c.back(t) : c.cpu(t); };
    if (v.isTensor()) return f(v.toTensor());
    if (v.isTensorList()) {
        c10::List<Tensor> out;
        for (const Tensor& t : v.toTensorList()) out.push_back(f(t));
        return out;
    }
    if (v.isOptionalTensorList()) {
        c10::List<optional<Tensor>> out;
        for (const optional<Tensor>& t : v.toOptionalTensorList()) out.push_back(t ? optional<Tensor>(f(*t)) : t);
        return out;
    }
    if (back) return v;
    if (v.isDevice() && v.toDevice().type() == KIND) return c10::Device(c10::DeviceType::CPU);
    if (v.isGenerator()) return hidden(v.toGenerator());
    if (v.isStorage() && v.toStorage().device_type() == KIND) return c.cpu(v.toStorage());
    return v;
}

void on_cpu(const c10::OperatorHandle& op, Stack* stack) {
    auto& schema = op.schema();
    auto n = schema.arguments().size(), first = stack->size() - n;
    check(op, *stack, first);
    Crossing c;
    bool given = false;
    for (size_t i = 0; i < n; i++) {
        auto& v = (*stack)[first + i];
        given |= v.isGenerator();
        if (schema.arguments()[i].name() == "pin_memory" && v.isBool()) v = IValue();
        else v = crossed(c, v, false);
    }
    Drawing drawing(!given && op.hasTag(at::Tag::nondeterministic_seeded));
    op.redispatchBoxed(ON_CPU, stack);
    c.settle();
    auto out = stack->size() - schema.returns().size();
    for (size_t i = out; i < stack->size(); i++) (*stack)[i] = crossed(c, (*stack)[i], true);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
    Crossing c;
    c.cpu(to).copy_(c.cpu(from));
    return to;
}
Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
    to.resize_(from.sizes());
    return copy_from(from, to, false);
}
void record_stream(Tensor&, c10::Stream) {}
bool interchangeable(const Tensor& a, const Tensor& b) { // a parameter that moves stays the same object
    return (here(a) || a.device().is_cpu()) && (here(b) || b.device().is_cpu()) && a.layout() == b.layout();
}

// --- recurrent layers, as cuDNN has them

int64_t gates(int64_t mode) { return mode == 2 ? 4 : mode == 3 ? 3 : 1; }

// Whether weights follow one another in one storage
bool one_chunk(at::TensorList ws) {
    auto bytes = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
    for (size_t i = 0; i < ws.size(); i++)
        if (!ws[i].is_contiguous() || !ws[i].storage().is_alias_of(ws[0].storage()) || (i && bytes(ws[i]) != bytes(ws[i-1]) + ws[i-1].nbytes())) return false;
    return true;
}

Tensor chunk_of(at::TensorList ws) {
    std::vector<Tensor> flat;
    for (auto& w : ws) flat.push_back(w.reshape(-1));
    return at::cat(flat);
}

void check_weights(at::TensorList ws, int64_t per_layer, int64_t input, int64_t mode, int64_t hidden, int64_t projected, int64_t layers, bool both) {
    auto width = projected ? projected : hidden, ways = int64_t(both ? 2 : 1), g = gates(mode) * hidden;
    TORCH_CHECK((int64_t)ws.size() == per_layer * layers * ways, "cuDNN RNN: ", per_layer * layers * ways, " weights wanted, got ", ws.size());
    for (size_t i = 0; i < ws.size(); i++) {
        TORCH_CHECK(here(ws[i]), "Input and parameter tensors are not at the same device, found input tensor at ", HERE, " and parameter tensor at ", ws[i].device());
        TORCH_CHECK(ws[i].scalar_type() == ws[0].scalar_type(), "cuDNN RNN: parameter types mismatch, got ", ws[i].scalar_type(), " and ", ws[0].scalar_type());
        auto layer = (int64_t)i / (per_layer * ways), k = (int64_t)i % per_layer;
        bool bias = per_layer >= 4;
        std::vector<int64_t> want;
        if (k == 0) want = {g, layer ? width * ways : input};
        else if (k == 1) want = {g, width};
        else if (bias && k < 4) want = {g};
        else want = {projected, hidden};
        TORCH_CHECK(ws[i].sizes() == at::IntArrayRef(want), "cuDNN RNN: weight ", i, " has the shape ", ws[i].sizes(), ", wanted ", at::IntArrayRef(want));
    }
}

Tensor flatten_weight(at::TensorList ws, int64_t per_layer, c10::SymInt input, int64_t mode, c10::SymInt hidden, c10::SymInt projected, int64_t layers, bool, bool both) {
    TORCH_CHECK(!ws.empty(), "_cudnn_rnn_flatten_weight_: cannot flatten empty weight list");
    check_weights(ws, per_layer, input.expect_int(), mode, hidden.expect_int(), projected.expect_int(), layers, both);
    auto whole = chunk_of(ws);
    int64_t at = 0;
    for (Tensor w : ws) {
        auto sizes = w.sizes().vec();
        std::vector<int64_t> strides(sizes.size(), 1);
        for (int i = (int)sizes.size() - 2; i >= 0; i--) strides[i] = strides[i+1] * sizes[i+1];
        w.set_(whole.storage(), at, sizes, strides);
        at += w.numel();
    }
    return whole;
}

struct Recurrent {
    bool bias; int64_t mode, layers; bool batch_first; double dropout; bool train, both; at::IntArrayRef lengths;
    std::vector<Tensor> operator()(const Tensor& x, const std::vector<Tensor>& ws, const Tensor& h, const Tensor& c) const {
        auto packed = !lengths.empty();
        auto sizes = packed ? at::tensor(lengths, at::kLong) : Tensor();
        auto pair = [](std::tuple<Tensor, Tensor> o) { return std::vector<Tensor>{std::get<0>(o), std::get<1>(o)}; };
        if (mode == 2) {
            auto o = packed ? at::lstm(x, sizes, {h, c}, ws, bias, layers, dropout, train, both) : at::lstm(x, {h, c}, ws, bias, layers, dropout, train, both, batch_first);
            return {std::get<0>(o), std::get<1>(o), std::get<2>(o)};
        }
        if (mode == 3) return pair(packed ? at::gru(x, sizes, h, ws, bias, layers, dropout, train, both) : at::gru(x, h, ws, bias, layers, dropout, train, both, batch_first));
        if (mode == 1) return pair(packed ? at::rnn_tanh(x, sizes, h, ws, bias, layers, dropout, train, both) : at::rnn_tanh(x, h, ws, bias, layers, dropout, train, both, batch_first));
        return pair(packed ? at::rnn_relu(x, sizes, h, ws, bias, layers, dropout, train, both) : at::rnn_relu(x, h, ws, bias, layers, dropout, train, both, batch_first));
    }
};

std::vector<Tensor> cpus(Crossing& c, at::TensorList ts) {
    std::vector<Tensor> out;
    for (auto& t : ts) out.push_back(c.cpu(t));
    return out;
}
std::vector<int64_t> ints(c10::SymIntArrayRef a) {
    std::vector<int64_t> out;
    for (auto& o : a) out.push_back(o.expect_int());
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cudnn_rnn(const Tensor& x, at::TensorList ws, int64_t per_layer, const optional<Tensor>& chunk, const Tensor& h,
        const optional<Tensor>& c, int64_t mode, c10::SymInt hidden_size, c10::SymInt projected, int64_t layers, bool batch_first, double dropout, bool train, bool both,
        c10::SymIntArrayRef lengths_, const optional<Tensor>& dropout_state) {
    auto lengths = ints(lengths_);
    check_weights(ws, per_layer, x.size(-1), mode, hidden_size.expect_int(), projected.expect_int(), layers, both);
    TORCH_CHECK(here(x) && here(h), "Input and hidden tensors are not at the same device, found input tensor at ", x.device(), " and hidden tensor at ", h.device());
    TORCH_CHECK(h.is_contiguous(), "rnn: hx is not contiguous");
    TORCH_CHECK(!c || !c->defined() || c->is_contiguous(), "rnn: cx is not contiguous");
    TORCH_CHECK(x.scalar_type() == ws[0].scalar_type(), "input dtype ", x.scalar_type(), " and weights' dtype ", ws[0].scalar_type(), " differ");
    TORCH_CHECK(dropout == 0 || !train || (dropout_state && dropout_state->defined()), "dropout needs a state of its own");
    Crossing k;
    Drawing drawing(true);
    auto reserve = train ? drawing.theirs.get_state() : at::empty({0}, at::kByte);
    auto o = Recurrent{per_layer >= 4, mode, layers, batch_first, dropout, train, both, lengths}(k.cpu(x.contiguous()), cpus(k, ws), k.cpu(h), c && c->defined() ? k.cpu(*c) : Tensor());
    auto whole = chunk && chunk->defined() ? *chunk : chunk_of(ws);
    return {k.back(o[0]), k.back(o[1]), o.size() > 2 ? k.back(o[2]) : at::empty({0}, x.options()), k.back(reserve), whole};
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> cudnn_rnn_backward(const Tensor& x, at::TensorList ws, int64_t per_layer, const Tensor&, const Tensor& h,
        const optional<Tensor>& c, const Tensor&, const optional<Tensor>& dout, const optional<Tensor>& dh, const optional<Tensor>& dc, int64_t mode, c10::SymInt, c10::SymInt,
        int64_t layers, bool batch_first, double dropout, bool train, bool both, c10::SymIntArrayRef lengths_, const optional<Tensor>&, const Tensor& reserve, std::array<bool, 4>) {
    TORCH_CHECK(train, "cudnn RNN backward can only be called in training mode");
    auto lengths = ints(lengths_);
    Crossing k;
    auto leaf = [&](const Tensor& t) { return k.cpu(t).detach().clone().requires_grad_(); };
    c10::impl::LocalDispatchKeySet clean{c10::impl::PODLocalDispatchKeySet{}};
    std::vector<Tensor> in, grads;
    {
        c10::impl::ForceDispatchKeyGuard plain(clean);
        at::AutoGradMode grad(true);
        Drawing drawing(true);
        auto after = drawing.theirs.get_state();
        drawing.theirs.set_state(k.cpu(reserve).clone());
        in = {leaf(x), leaf(h)};
        bool cell = c && c->defined();
        if (cell) in.push_back(leaf(*c));
        std::vector<Tensor> weights;
        for (auto& w : ws) { weights.push_back(leaf(w)); in.push_back(weights.back()); }
        auto o = Recurrent{per_layer >= 4, mode, layers, batch_first, dropout, train, both, lengths}(in[0], weights, in[1], cell ? in[2] : Tensor());
        drawing.theirs.set_state(after);
        std::vector<Tensor> outs, gs;
        const optional<Tensor>* all[] = {&dout, &dh, &dc};
        for (size_t i = 0; i < o.size(); i++) if (*all[i] && (*all[i])->defined()) { outs.push_back(o[i]); gs.push_back(k.cpu(**all[i])); }
        grads = torch::autograd::grad(outs, in, gs, false, false, true);
        for (size_t i = 0; i < grads.size(); i++) grads[i] = k.back(grads[i].defined() ? grads[i].contiguous() : at::zeros_like(in[i]));
        if (!cell) grads.insert(grads.begin() + 2, Tensor());
    }
    return {grads[0], grads[1], grads[2], {grads.begin() + 3, grads.end()}};
}

std::tuple<Tensor, Tensor, Tensor> recurrent(int64_t mode, const Tensor& x_, c10::SymIntArrayRef lengths, const Tensor& h, const Tensor& c, at::TensorList ws, bool bias, int64_t layers,
        double dropout, bool train, bool both, bool batch_first) {
    TORCH_CHECK(here(x_) && here(h) && (!c.defined() || here(c)), "Input and hidden tensors are not at the same device, found input tensor at ", x_.device(), " and hidden tensor at ", h.device());
    auto hidden_size = c.defined() ? c.sym_size(2) : h.sym_size(2);
    auto projected = c.defined() && h.sym_size(2) != hidden_size ? h.sym_size(2) : c10::SymInt(0);
    auto per_layer = (bias ? 4 : 2) + (projected != 0 ? 1 : 0);
    optional<Tensor> chunk;
    if (one_chunk(ws)) {
        int64_t n = 0;
        for (auto& w : ws) n += w.numel();
        chunk = at::empty({0}, ws[0].options()).set_(ws[0].storage());
        if (chunk->numel() > n) chunk = chunk->narrow(0, ws[0].storage_offset(), n);
    } else
        TORCH_WARN("RNN module weights are not part of single contiguous chunk of memory. This means they need to be compacted at every call, possibly greatly increasing memory usage. "
            "To compact weights again call flatten_parameters().");
    auto state = dropout > 0 && train ? at::empty({1}, x_.options().dtype(at::kByte)) : Tensor();
    auto o = at::_cudnn_rnn_symint(x_, ws, per_layer, chunk, h.contiguous(), c.defined() ? optional<Tensor>(c.contiguous()) : optional<Tensor>(), mode, hidden_size, projected, layers,
        batch_first, dropout, train, both, lengths, state);
    return {std::get<0>(o), std::get<1>(o), std::get<2>(o)};
}

std::vector<c10::SymInt> lengths_of(const Tensor& t) {
    TORCH_CHECK(t.device().is_cpu(), "batch_sizes tensor should be on CPU, but got on ", t.device());
    std::vector<c10::SymInt> out;
    for (int64_t i = 0; i < t.numel(); i++) out.emplace_back(t.const_data_ptr<int64_t>()[i]);
    return out;
}

std::tuple<Tensor, Tensor, Tensor> lstm(const Tensor& x, at::TensorList h, at::TensorList ws, bool bias, int64_t layers, double dropout, bool train, bool both, bool batch_first) {
    return recurrent(2, x, {}, h[0], h[1], ws, bias, layers, dropout, train, both, batch_first);
}
std::tuple<Tensor, Tensor, Tensor> lstm_packed(const Tensor& x, const Tensor& sizes, at::TensorList h, at::TensorList ws, bool bias, int64_t layers, double dropout, bool train, bool both) {
    return recurrent(2, x, lengths_of(sizes), h[0], h[1], ws, bias, layers, dropout, train, both, false);
}
template <int64_t mode> std::tuple<Tensor, Tensor> simple(const Tensor& x, const Tensor& h, at::TensorList ws, bool bias, int64_t layers, double dropout, bool train, bool both, bool batch_first) {
    auto o = recurrent(mode, x, {}, h, Tensor(), ws, bias, layers, dropout, train, both, batch_first);
    return {std::get<0>(o), std::get<1>(o)};
}
template <int64_t mode> std::tuple<Tensor, Tensor> simple_packed(const Tensor& x, const Tensor& sizes, const Tensor& h, at::TensorList ws, bool bias, int64_t layers, double dropout, bool train, bool both) {
    auto o = recurrent(mode, x, lengths_of(sizes), h, Tensor(), ws, bias, layers, dropout, train, both, false);
    return {std::get<0>(o), std::get<1>(o)};
}

// --- attention: its parts, each an operation

int64_t attention_choice(const Tensor&, const Tensor&, const Tensor&, const optional<Tensor>&, double, bool, optional<double>, bool) { return static_cast<int64_t>(at::SDPBackend::math); }

// --- the device

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return KIND; }
    c10::Device exchangeDevice(c10::Device) const override { return HERE; }
    c10::Device getDevice() const override { return HERE; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
    c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
    c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
    c10::Stream getNewStream(c10::Device, int) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
    c10::Stream exchangeStream(c10::Stream) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
    void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override {}
    void synchronizeEvent(void*) const override {}
    void synchronizeDevice(const c10::DeviceIndex) const override {}
    double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0; }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
    c10::DeviceIndex deviceCount() const override { return 1; }
    c10::DeviceIndex getCurrentDevice() const override { return 0; }
    void setCurrentDevice(c10::DeviceIndex) const override {}
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
    const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return numbers(); }
    at::Generator getNewGenerator(c10::DeviceIndex) const override { return made(); }
    void resizePrivateUse1Bytes(const Storage& s, size_t n) const override {
        auto was = held_by(s);
        auto data = memory.allocate(n);
        std::memcpy(data.mutable_get(), was.data(), std::min(n, was.nbytes()));
        s.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
        s.unsafeGetStorageImpl()->set_nbytes(n);
    }
};
const bool hooked = [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); return true; }();
} // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_choice)
}

#define RECURRENT(m) \
    m.impl("lstm.input", &lstm); m.impl("lstm.data", &lstm_packed); \
    m.impl("gru.input", &simple<3>); m.impl("gru.data", &simple_packed<3>); \
    m.impl("rnn_tanh.input", &simple<1>); m.impl("rnn_tanh.data", &simple_packed<1>); \
    m.impl("rnn_relu.input", &simple<0>); m.impl("rnn_relu.data", &simple_packed<0>);

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) { RECURRENT(m) m.impl("_has_compatible_shallow_copy_type", &interchangeable); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    RECURRENT(m)
    m.impl("_has_compatible_shallow_copy_type", &interchangeable);
    m.impl("_copy_from", &copy_from);
    m.impl("_copy_from_and_resize", &copy_from_and_resize);
    m.impl("record_stream", &record_stream);
    m.impl("_cudnn_rnn", &cudnn_rnn);
    m.impl("_cudnn_rnn_backward", &cudnn_rnn_backward);
    m.impl("_cudnn_rnn_flatten_weight", &flatten_weight);
    for (auto o : {"convolution", "convolution_backward"}) m.impl(o, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}
// a copy heeds what a tensor has been told to take as negated or conjugated
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY(pretend, m) {
    m.def("lenient(str[] names) -> ()", [](std::vector<string> names) { unchecked().insert(names.begin(), names.end()); });
    m.def("seed(int seed) -> ()", [](int64_t seed) { at::Generator g = numbers(); g.set_current_seed(seed); });
    m.def("state() -> Tensor", [] { return numbers().get_state(); });
    m.def("set_state(Tensor state) -> ()", [](const Tensor& state) { at::Generator g = numbers(); g.set_state(state); });
}
