// The classes of CANN's graph engine (namespace ge) whose objects MindSpore makes and asks again while it chooses
// kernels. They return what they were given. Names and signatures are those that MindSpore's library asks for.
#include <any>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ge {

enum DataType { DT_FLOAT = 0, DT_LAST = 0x7fffffff };
enum Format { FORMAT_LAST = 0x7fffffff };
enum Placement { PLACEMENT_LAST = 0x7fffffff };

// ---- strings and shapes ----

class AscendString {
 public:
  AscendString() = default;
  AscendString(const char *text);
  const char *GetString() const;
  bool operator<(const AscendString &other) const;

 private:
  std::shared_ptr<std::string> text_;
};

AscendString::AscendString(const char *text) : text_(std::make_shared<std::string>(text ? text : "")) {}
const char *AscendString::GetString() const { return text_ ? text_->c_str() : ""; }
bool AscendString::operator<(const AscendString &other) const {
  return std::string(GetString()) < other.GetString();
}

class Shape {
 public:
  Shape();
  explicit Shape(const std::vector<int64_t> &dims);
  size_t GetDimNum() const;
  void SetDim(size_t index, int64_t value);
  int64_t GetDim(size_t index) const;
  std::vector<int64_t> GetDims() const;

 private:
  std::shared_ptr<std::vector<int64_t>> dims_;
};

Shape::Shape() : dims_(std::make_shared<std::vector<int64_t>>()) {}
Shape::Shape(const std::vector<int64_t> &dims) : dims_(std::make_shared<std::vector<int64_t>>(dims)) {}
size_t Shape::GetDimNum() const { return dims_->size(); }
void Shape::SetDim(size_t index, int64_t value) {
  if (index < dims_->size()) (*dims_)[index] = value;
}
int64_t Shape::GetDim(size_t index) const { return index < dims_->size() ? (*dims_)[index] : 0; }
std::vector<int64_t> Shape::GetDims() const { return *dims_; }

// ---- tensors ----

struct DescValues {
  Shape shape, origin;
  Format format{};
  DataType type{};
};

class TensorDesc {
 public:
  TensorDesc();
  TensorDesc(const TensorDesc &other);
  TensorDesc(TensorDesc &&other);
  TensorDesc(Shape shape, Format format, DataType type);
  TensorDesc &operator=(const TensorDesc &other) = default;
  void SetDataType(DataType type);
  void SetFormat(Format format);
  void SetOriginShape(const Shape &shape);
  void SetPlacement(Placement placement);
  void SetRealDimCnt(int64_t count);
  void SetShape(const Shape &shape);
  DataType GetDataType() const;
  Format GetFormat() const;
  Shape GetOriginShape() const;
  Shape GetShape() const;

 private:
  std::shared_ptr<DescValues> values_;
};

TensorDesc::TensorDesc() : values_(std::make_shared<DescValues>()) {}
TensorDesc::TensorDesc(const TensorDesc &other) : values_(std::make_shared<DescValues>(*other.values_)) {}
TensorDesc::TensorDesc(TensorDesc &&other) : values_(std::make_shared<DescValues>(*other.values_)) {}
TensorDesc::TensorDesc(Shape shape, Format format, DataType type) : TensorDesc() {
  values_->shape = shape;
  values_->format = format;
  values_->type = type;
}
void TensorDesc::SetDataType(DataType type) { values_->type = type; }
void TensorDesc::SetFormat(Format format) { values_->format = format; }
void TensorDesc::SetOriginShape(const Shape &shape) { values_->origin = shape; }
void TensorDesc::SetPlacement(Placement) {}
void TensorDesc::SetRealDimCnt(int64_t) {}
void TensorDesc::SetShape(const Shape &shape) { values_->shape = shape; }
DataType TensorDesc::GetDataType() const { return values_->type; }
Format TensorDesc::GetFormat() const { return values_->format; }
Shape TensorDesc::GetOriginShape() const { return values_->origin; }
Shape TensorDesc::GetShape() const { return values_->shape; }

struct TensorValues {
  TensorDesc desc;
  std::vector<uint8_t> data;
};

class Tensor {
 public:
  Tensor();
  explicit Tensor(const TensorDesc &desc);
  Tensor(const TensorDesc &desc, const uint8_t *data, size_t size);
  uint32_t SetData(const uint8_t *data, size_t size);
  uint32_t SetData(uint8_t *data, size_t size, const std::function<void(uint8_t *)> &free);
  uint32_t SetData(const std::string &text);
  uint32_t SetData(const std::vector<std::string> &texts);
  uint8_t *GetData();
  size_t GetSize() const;
  TensorDesc GetTensorDesc() const;

 private:
  std::shared_ptr<TensorValues> values_;
};

Tensor::Tensor() : values_(std::make_shared<TensorValues>()) {}
Tensor::Tensor(const TensorDesc &desc) : Tensor() { values_->desc = desc; }
Tensor::Tensor(const TensorDesc &desc, const uint8_t *data, size_t size) : Tensor(desc) { SetData(data, size); }
uint32_t Tensor::SetData(const uint8_t *data, size_t size) {
  if (data) values_->data.assign(data, data + size);
  return 0;
}
uint32_t Tensor::SetData(uint8_t *data, size_t size, const std::function<void(uint8_t *)> &) {
  return SetData(data, size);
}
uint32_t Tensor::SetData(const std::string &) { return 0; }
uint32_t Tensor::SetData(const std::vector<std::string> &) { return 0; }
uint8_t *Tensor::GetData() { return values_->data.data(); }
size_t Tensor::GetSize() const { return values_->data.size(); }
TensorDesc Tensor::GetTensorDesc() const { return values_->desc; }

// ---- operators: a name, a type, and attributes of any type ----

// X(type of the key, type of the parameter, type that is kept)
#define SET_ATTR(X)                                                                              \
  X(const char *, const Tensor &, Tensor)                                                        \
  X(const char *, const DataType &, DataType)                                                    \
  X(const char *, const std::vector<DataType> &, std::vector<DataType>)                          \
  X(const char *, const std::vector<std::vector<int64_t>> &, std::vector<std::vector<int64_t>>)  \
  X(const char *, const std::vector<float> &, std::vector<float>)                                \
  X(const char *, const std::vector<int32_t> &, std::vector<int32_t>)                            \
  X(const char *, const std::vector<int64_t> &, std::vector<int64_t>)                            \
  X(const char *, const char *, std::string)                                                     \
  X(const char *, bool, bool)                                                                    \
  X(const char *, float, float)                                                                  \
  X(const char *, int32_t, int32_t)                                                              \
  X(const char *, uint32_t, uint32_t)                                                            \
  X(const char *, int64_t, int64_t)                                                              \
  X(const std::string &, const std::vector<std::string> &, std::vector<std::string>)             \
  X(const std::string &, const std::vector<bool> &, std::vector<bool>)                           \
  X(const std::string &, const std::vector<float> &, std::vector<float>)                         \
  X(const std::string &, const std::vector<int32_t> &, std::vector<int32_t>)                     \
  X(const std::string &, const std::vector<int64_t> &, std::vector<int64_t>)                     \
  X(const std::string &, const std::string &, std::string)                                       \
  X(const std::string &, bool, bool)                                                             \
  X(const std::string &, float, float)                                                           \
  X(const std::string &, int32_t, int32_t)                                                       \
  X(const std::string &, int64_t, int64_t)

// X(type of the parameter)
#define ATTR_REGISTER(X)                     \
  X(const AscendString &)                    \
  X(const Tensor &)                          \
  X(const DataType &)                        \
  X(const std::vector<AscendString> &)       \
  X(const std::vector<DataType> &)           \
  X(const std::vector<std::vector<int64_t>> &) \
  X(const std::vector<float> &)              \
  X(const std::vector<int64_t> &)            \
  X(bool)                                    \
  X(float)                                   \
  X(int64_t)

// X(type of the key, type of the value)
#define GET_ATTR(X)                                   \
  X(const char *, Tensor)                             \
  X(const char *, DataType)                           \
  X(const char *, std::vector<DataType>)              \
  X(const char *, std::vector<std::vector<int64_t>>)  \
  X(const char *, std::vector<float>)                 \
  X(const char *, std::vector<int32_t>)               \
  X(const char *, std::vector<int64_t>)               \
  X(const char *, bool)                               \
  X(const char *, float)                              \
  X(const char *, int32_t)                            \
  X(const char *, int64_t)                            \
  X(const std::string &, std::string)                 \
  X(const std::string &, std::vector<std::string>)

struct OperatorValues {
  std::string name, type;
  std::map<std::string, std::any> attributes;
};

class Operator {
 public:
  explicit Operator(const std::string &type);
  explicit Operator(const char *type);
  Operator(const std::string &name, const std::string &type);
  Operator(const char *name, const char *type);
  Operator(const AscendString &name, const AscendString &type);
  virtual ~Operator() = default;
  std::string GetName() const;
  std::string GetOpType() const;
  uint32_t GetName(AscendString &name) const;
  uint32_t GetOpType(AscendString &type) const;
#define DECLARE(Key, Parameter, Kept) Operator &SetAttr(Key, Parameter);
  SET_ATTR(DECLARE)
#undef DECLARE
#define DECLARE(Parameter) void AttrRegister(const char *, Parameter);
  ATTR_REGISTER(DECLARE)
#undef DECLARE
#define DECLARE(Key, Value) uint32_t GetAttr(Key, Value &) const;
  GET_ATTR(DECLARE)
#undef DECLARE
  Operator &SetInput(const char *, const Operator &);
  Operator &SetInput(const char *, uint32_t, const Operator &);
  Operator &SetInput(const char *, uint32_t, const Operator &, const char *);
  Operator &SetInput(const std::string &, const Operator &);
  Operator &SetInput(const std::string &, const Operator &, const std::string &);
  Operator &AddControlInput(const Operator &);

 private:
  std::shared_ptr<OperatorValues> values_;
};

Operator::Operator(const std::string &name, const std::string &type) : values_(std::make_shared<OperatorValues>()) {
  values_->name = name;
  values_->type = type;
}
Operator::Operator(const std::string &type) : Operator(std::string(), type) {}
Operator::Operator(const char *type) : Operator(std::string(), std::string(type ? type : "")) {}
Operator::Operator(const char *name, const char *type)
    : Operator(std::string(name ? name : ""), std::string(type ? type : "")) {}
Operator::Operator(const AscendString &name, const AscendString &type) : Operator(name.GetString(), type.GetString()) {}
std::string Operator::GetName() const { return values_->name; }
std::string Operator::GetOpType() const { return values_->type; }
uint32_t Operator::GetName(AscendString &name) const {
  name = AscendString(values_->name.c_str());
  return 0;
}
uint32_t Operator::GetOpType(AscendString &type) const {
  type = AscendString(values_->type.c_str());
  return 0;
}

#define DEFINE(Key, Parameter, Kept)                 \
  Operator &Operator::SetAttr(Key key, Parameter value) { \
    values_->attributes[key] = Kept(value);          \
    return *this;                                    \
  }
SET_ATTR(DEFINE)
#undef DEFINE
#define DEFINE(Parameter) \
  void Operator::AttrRegister(const char *key, Parameter value) { values_->attributes[key] = value; }
ATTR_REGISTER(DEFINE)
#undef DEFINE
#define DEFINE(Key, Value)                                       \
  uint32_t Operator::GetAttr(Key key, Value &value) const {      \
    auto found = values_->attributes.find(key);                  \
    if (found == values_->attributes.end()) return 1;            \
    auto kept = std::any_cast<Value>(&found->second);            \
    if (kept) value = *kept;                                     \
    return kept ? 0 : 1;                                         \
  }
GET_ATTR(DEFINE)
#undef DEFINE

Operator &Operator::SetInput(const char *, const Operator &) { return *this; }
Operator &Operator::SetInput(const char *, uint32_t, const Operator &) { return *this; }
Operator &Operator::SetInput(const char *, uint32_t, const Operator &, const char *) { return *this; }
Operator &Operator::SetInput(const std::string &, const Operator &) { return *this; }
Operator &Operator::SetInput(const std::string &, const Operator &, const std::string &) { return *this; }
Operator &Operator::AddControlInput(const Operator &) { return *this; }

struct OperatorFactory {
  static Operator CreateOperator(const char *name, const char *type);
  static Operator CreateOperator(const std::string &name, const std::string &type);
  static bool IsExistOp(const char *type);
  static bool IsExistOp(const std::string &type);
};
Operator OperatorFactory::CreateOperator(const char *name, const char *type) { return Operator(name, type); }
Operator OperatorFactory::CreateOperator(const std::string &name, const std::string &type) {
  return Operator(name, type);
}
bool OperatorFactory::IsExistOp(const char *) { return true; }
bool OperatorFactory::IsExistOp(const std::string &) { return true; }

}  // namespace ge
