# Writes the texts that GPU programs are made of into a C file: every *.cu of this folder, and what
# they include, directly or not, from this folder or the one above. Of the system's headers they get
# empty ones: library.h has what is needed of them.
#   cmake -DOUTPUT=cuda_texts.c -P csrc/cuda/embed.cmake

set(folder "${CMAKE_CURRENT_LIST_DIR}")
set(programs "")
set(wanted "")
file(GLOB names RELATIVE "${folder}" "${folder}/*.cu")
foreach(name IN LISTS names)
  list(APPEND wanted "${name}")
  string(REGEX REPLACE "\\.cu$" "" name "${name}")
  string(APPEND programs "    \"${name}\",\n")
endforeach()

set(texts "")
set(seen "")
while(wanted)
  list(POP_FRONT wanted name)
  if(name IN_LIST seen)
    continue()
  endif()
  list(APPEND seen "${name}")
  set(path "${folder}/${name}")
  if(NOT EXISTS "${path}")
    set(path "${folder}/../${name}")
  endif()
  set(text "")
  if(EXISTS "${path}")
    file(READ "${path}" text)
    file(STRINGS "${path}" lines REGEX "^ *# *include *[<\"]")
    foreach(line IN LISTS lines)
      string(REGEX REPLACE "^ *# *include *[<\"]([^>\"]*).*$" "\\1" included "${line}")
      list(APPEND wanted "${included}")
    endforeach()
  endif()
  string(REPLACE "\\" "\\\\" text "${text}")
  string(REPLACE "\"" "\\\"" text "${text}")
  string(REPLACE "\n" "\\n\"\n     \"" text "${text}")
  string(APPEND texts "    {\"${name}\",\n     \"${text}\"},\n")
endwhile()

file(WRITE "${OUTPUT}" "/* Made by embed.cmake. */
#include \"cuda/driver.h\"

const char *const cuda_programs[] = {
${programs}    NULL};

const cuda_text cuda_texts[] = {
${texts}    {NULL, NULL}};
")
