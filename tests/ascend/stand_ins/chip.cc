// Names the chip: MindSpore's dry run leaves the name empty, and then decides as on a chip that it does not know.
#include <memory>
#include <string>

namespace mindspore {
struct MsContext {
  static std::shared_ptr<MsContext> GetInstance();
  void set_ascend_soc_version(const std::string &version);
  void set_ascend_soc_name(const std::string &name);
};
}  // namespace mindspore

extern "C" void name_chip() {
  auto context = mindspore::MsContext::GetInstance();
  context->set_ascend_soc_version("ascend910b");
  context->set_ascend_soc_name("Ascend910B3");
}
