# find_package(c2c_ext): c2c_ext::c2c_ext, a library whose loading registers the ops c2c::*. Link it
# beside torch's own targets; it has no headers, its ops are called through torch's dispatcher.
get_filename_component(_c2c_ext_dir "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET c2c_ext::c2c_ext)
  add_library(c2c_ext::library SHARED IMPORTED)
  set_target_properties(c2c_ext::library PROPERTIES
    IMPORTED_LOCATION "${_c2c_ext_dir}/libc2c_ext.so" IMPORTED_SONAME libc2c_ext.so)
  # A program names no symbol of it, so a linker told --as-needed would drop it.
  add_library(c2c_ext::c2c_ext INTERFACE IMPORTED)
  set_target_properties(c2c_ext::c2c_ext PROPERTIES INTERFACE_LINK_LIBRARIES
    "-Wl,--push-state,--no-as-needed;c2c_ext::library;-Wl,--pop-state")
endif()
unset(_c2c_ext_dir)
