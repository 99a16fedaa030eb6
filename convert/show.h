/* show.h - the report of a conversion that was just written. */
#ifndef URCHIN_CONVERT_SHOW_H
#define URCHIN_CONVERT_SHOW_H

#include "compute/team.h"
#include "config/settings.h"
#include "convert/reading.h"

/* Opens the model in folder, reads the sample with it, adds what its heads do (`heads`, head_report.h) to
 * folder/conversion.json and writes folder/conversion.html.  A sample too short for linear keys adds nothing. */
enum err show_conversion(const char *folder, const struct settings *settings, struct team *team,
                         const struct text *sample, char *msg, size_t msg_len);

#endif
