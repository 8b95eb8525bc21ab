// The engine's tests below Python, built by `make sanitize` with the sanitizers.
#include "check.h"

int main() {
  using namespace goku::io::testing;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (const Kind& kind : kinds())
    std::printf("%s, direct %s\n", goku::io::name(kind.backend), goku::io::name(kind.direct));
  for (const auto& [words, test] :
       {std::pair("copies", &test_copies), std::pair("transfers", &test_transfers),
        std::pair("life", &test_life), std::pair("faults", &test_faults)}) {
    std::printf("%s\n", words);
    test();
  }
  std::printf("passed\n");
}
