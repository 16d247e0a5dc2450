// Prints the instruction sets that this machine runs, for CMake (VENEER_ISAS=native).
#include <cstdio>

#define VENEER_ISA generic  // isa.h then asks for no tables
#include "core/isa.cpp"

int main() {
  const char* before = "";
  for (const std::string& name : veneer::usable_isas()) {
    std::printf("%s%s", before, name.c_str());
    before = ";";
  }
}
